"""What the stand-in Hub takes: a new repository, a branch, files over LFS, and a commit, as the real one's HTTP API."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.integration.stand_in_hub import StandInHub

Answer = Callable[..., None]  # reply(status, body, **headers)
WRITES = "/api/repos/create|/api/validate-yaml|/api/models/.+/(preupload|commit|branch)/.+|/.+[.]git/info/lfs/.+"


def take_upload(hub: "StandInHub", method: str, path: str, body: bytes, may_write: bool | None, reply: Answer) -> bool:
    """Answer a request that writes; False where it is none. `may_write` is None without a token."""
    if method == "PUT" and path.startswith("/upload/"):
        _take_blob(hub, path.removeprefix("/upload/"), body, reply)
        return True
    if method != "POST" or not re.fullmatch(WRITES, path):
        return False
    if path == "/api/validate-yaml":
        reply(200, b'{"warnings": [], "errors": []}')
    elif not may_write:
        reply(401 if may_write is None else 403, b'{"error": "no write access"}')
    elif path == "/api/repos/create":
        _create(hub, json.loads(body), reply)
    elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
        _offer_uploads(hub, json.loads(body), reply)
    elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", path):
        take = {"preupload": _choose_modes, "branch": _branch, "commit": _commit}[match[2]]
        take(hub, f"models/{match[1]}", match[3], body, reply)
    return True


def _create(hub: "StandInHub", asked: dict[str, Any], reply: Answer) -> None:
    from tests.integration.stand_in_hub import Repo

    key = f"models/{asked['organization']}/{asked['name']}"
    status = 409 if key in hub.repos else 200
    if status == 200:
        hub.repos[key] = Repo.of({".gitattributes": b""}, private=asked["visibility"] == "private")
    reply(status, json.dumps({"url": f"{hub.endpoint}/{key.removeprefix('models/')}"}).encode())


def _branch(hub: "StandInHub", key: str, name: str, body: bytes, reply: Answer) -> None:
    repo = hub.repos[key]
    status = 409 if name in repo.refs else 200
    repo.refs.setdefault(name, repo.head)
    reply(status, b"{}")


def _choose_modes(hub: "StandInHub", key: str, revision: str, body: bytes, reply: Answer) -> None:
    from tests.integration.stand_in_hub import LFS_BYTES

    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["size"] >= LFS_BYTES else "regular",
            "shouldIgnore": False,
            "oid": None,
        }
        for file in json.loads(body)["files"]
    ]
    reply(200, json.dumps({"files": files}).encode())


def _offer_uploads(hub: "StandInHub", asked: dict[str, Any], reply: Answer) -> None:
    """Addresses to put each object to; none for one that is there."""
    objects = []
    for item in asked["objects"]:
        offer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in hub.blobs:
            offer["actions"] = {"upload": {"href": f"{hub.cdn}/upload/{item['oid']}", "header": {}}}
        objects.append(offer)
    reply(200, json.dumps({"objects": objects, "transfer": "basic"}).encode())


def _take_blob(hub: "StandInHub", oid: str, body: bytes, reply: Answer) -> None:
    if hashlib.sha256(body).hexdigest() != oid:
        reply(400, b"not what was announced")
        return
    hub.blobs[oid] = body
    reply(200, b"")


def _commit(hub: "StandInHub", key: str, revision: str, body: bytes, reply: Answer) -> None:
    """Take the lines of a commit: its header, files in base64, and names of LFS objects."""
    repo = hub.repos[key]
    files = dict(repo.commits[repo.refs[revision]])
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in hub.blobs:
                reply(400, b'{"error": "an LFS object was never uploaded"}')
                return
            files[value["path"]] = hub.blobs[value["oid"]]
        else:
            hub.messages.append(value["summary"])
    commit = hashlib.sha1(body).hexdigest()
    repo.commits[commit], repo.refs[revision] = files, commit
    url = f"{hub.endpoint}/{key.removeprefix('models/')}/commit/{commit}"
    reply(200, json.dumps({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None}).encode())
