"""A Hub on 127.0.0.1 that serves the HTTP API of the real one for made repositories, and breaks where it is told to.

Large files lie on a second server, as on the real Hub's CDN: `resolve` answers with a redirect to a signed address.
What it knows of the real one's answers: gated repositories show their metadata to everyone and refuse their files with
`X-Error-Code: GatedRepo` (401 without a token, 403 with one that has no access); a missing or private repository is
401 without a token and 404 with one.
"""

import functools
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.integration.stand_in_uploads import take_upload

SIGNATURE = "X-Amz-Signature=planted-signature"
GOOD_TOKEN, OTHER_TOKEN = "hf_goodPlanted", "hf_otherPlanted"  # one account has access to gated repositories, one not
LFS_BYTES = 4096


def commit_of(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


@functools.cache
def digests_of(data: bytes) -> tuple[str, str]:
    """The sha1 by which git names a file, and its sha256."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), hashlib.sha256(data).hexdigest()


@dataclass
class Repo:
    """A repository: the files of each commit, and the branches and tags that point to commits."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    card: dict[str, Any] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    disabled: bool = False
    claimed_sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, files: dict[str, bytes], **fields: Any) -> "Repo":
        """A repository of one commit."""
        commit = commit_of("first")
        return cls({commit: files}, {"main": commit}, **fields)

    @property
    def head(self) -> str:
        return self.refs["main"]


@dataclass
class Fault:
    """What goes wrong for the next `times` requests whose "METHOD path" matches; by default nothing does."""

    pattern: str
    times: int = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body, before the connection is closed
    ignores_range: bool = False
    flips_a_bit: bool = False


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    token: str | None
    on_cdn: bool


class StandInHub:
    """The state of both servers: repositories by "datasets/owner/name" or "models/owner/name", faults, requests."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.num_body_bytes = 0
        self.endpoint = self.cdn = ""
        self.blobs: dict[str, bytes] = {}
        self.messages: list[str] = []  # of the commits that were taken
        self.stalled, self._gate = threading.Event(), threading.Event()
        self._stall: tuple[str, int] | None = None

    def stall_after(self, pattern: str, num_requests: int) -> None:
        """Keep later requests that match without an answer until `go_on`; `stalled` is set when one waits."""
        self.stalled.clear()
        self._gate.clear()
        self._stall = (pattern, num_requests)

    def go_on(self) -> None:
        self._stall = None
        self._gate.set()

    def kill_when_stalled(self, script: str, folder: Path, *, after: tuple[str, int]) -> None:
        """Run a script for `folder` in a process of its own, and kill -9 it while a request waits, as `stall_after`."""
        self.stall_after(*after)
        env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": self.endpoint, "HF_HOME": str(folder / "hf")}
        with subprocess.Popen([sys.executable, "-c", script, str(folder)], env=env) as process:
            assert self.stalled.wait(300)
            process.kill()
        self.go_on()

    def wait_if_stalled(self) -> None:
        if self._stall is not None and self.count(self._stall[0]) > self._stall[1]:
            self.stalled.set()
            self._gate.wait(60)

    def forget(self) -> None:
        self.requests.clear()
        self.faults.clear()
        self.num_body_bytes = 0

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, f"{request.method} {request.path}") is not None for request in self.requests)


@contextmanager
def running_hub() -> Iterator[StandInHub]:
    hub = StandInHub()
    servers = [
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub, "on_cdn": on_cdn}))
        for on_cdn in (False, True)
    ]
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in servers]
    for server, thread in zip(servers, threads, strict=True):
        server.daemon_threads = True
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandInHub
    on_cdn: bool

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the terminal."""

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        may_write = token == GOOD_TOKEN if token in (GOOD_TOKEN, OTHER_TOKEN) else None
        path = unquote(url.path)
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), token, self.on_cdn))
        self.hub.wait_if_stalled()
        self.fault = self._next_fault(path)
        if self.fault.status is not None:
            self.reply(self.fault.status, b"", **self.fault.headers)
        elif take_upload(self.hub, self.command, path, body, may_write, self.reply):
            return
        elif self.on_cdn:
            self.reply_file(self.hub.blobs[path.removeprefix("/blob/")], ETag='"cdn"')
        elif token is not None and token not in (GOOD_TOKEN, OTHER_TOKEN):
            self.reply(401, b"{}", X_Error_Message="Invalid credentials in Authorization header")
        elif match := re.fullmatch(r"/api/((?:datasets|models)/[^/]+/[^/]+)/auth-check", path):
            if (found := self._repo(match[1], "main")) is not None and not self._refused(found[0], token):
                self.reply(200, b"{}")
        elif match := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(\w[\w-]*)/(.+))?", path):
            self.api(
                f"{match[1]}/{match[2]}", match[3] or "revision", match[4] or "main", parse_qs(url.query), body.decode()
            )
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/(refs/[^/]+/[^/]+|[^/]+)/(.+)", path):
            self.resolve(f"{(match[1] or 'models/')}{match[2]}", match[3], match[4], token)
        else:
            self.reply(404, b"{}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _next_fault(self, path: str) -> Fault:
        for fault in self.hub.faults:
            if fault.times > 0 and re.search(fault.pattern, f"{self.command} {path}"):
                fault.times -= 1
                return fault
        return Fault("")

    def _repo(self, key: str, revision: str) -> tuple[Repo, str] | None:
        """The repository and the commit of a revision, or the refusal sent."""
        repo = self.hub.repos.get(key)
        if repo is None:
            known = self.headers.get("Authorization") is not None
            self.reply(404 if known else 401, b'{"error":"Repository not found"}', X_Error_Code="RepoNotFound")
        elif repo.disabled:
            self.reply(403, b"{}", X_Error_Message="Access to this resource is disabled.")
        else:
            commit = repo.refs.get(revision, revision)
            if commit in repo.commits:
                return repo, commit
            self.reply(404, b"{}", X_Error_Code="RevisionNotFound")
        return None

    def api(self, key: str, action: str, rest: str, query: Mapping[str, Any], body: str) -> None:
        revision, _, folder = rest.partition("/") if not rest.startswith("refs/") else (rest, "", "")
        found = self._repo(key, revision)
        if found is None:
            return
        repo, commit = found
        files = repo.commits[commit]
        infos = [self._info(repo, name, data) for name, data in files.items()]
        if action == "revision":
            siblings = [{"rfilename": info["path"]} for info in infos]
            if query.get("blobs", [""])[0].lower() in ("true", "1"):
                siblings = [
                    {"rfilename": i["path"], "size": i["size"], "blobId": i["oid"], "lfs": self._lfs(i)} for i in infos
                ]
            answer = {"id": key.partition("/")[2], "sha": commit, "siblings": siblings, "cardData": repo.card}
            answer["private"] = repo.private
            self.reply(200, json.dumps({**answer, "gated": "manual" if repo.gated else False}).encode())
            return
        if action == "paths-info":
            asked = parse_qs(body)["paths"]
            answer = [info for info in infos if info["path"] in asked]
        else:  # tree
            inside = [info for info in infos if not folder or info["path"].startswith(f"{folder}/")]
            deep = query.get("recursive", [""])[0].lower() in ("true", "1")
            answer = inside if deep else list(self._level(inside, folder))
        self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")

    def _level(self, infos: list[dict[str, Any]], folder: str) -> Iterator[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        folders = {
            info["path"].removeprefix(prefix).split("/")[0] for info in infos if "/" in info["path"][len(prefix) :]
        }
        yield from ({"type": "directory", "path": prefix + name, "oid": commit_of(name), "size": 0} for name in folders)
        yield from (info for info in infos if "/" not in info["path"][len(prefix) :])

    def _info(self, repo: Repo, name: str, data: bytes) -> dict[str, Any]:
        size = repo.claimed_sizes.get(name, len(data))
        oid, sha256 = digests_of(data)
        info = {"type": "file", "path": name, "size": size, "oid": oid}
        if len(data) < LFS_BYTES:
            return info
        return {**info, "lfs": {"oid": sha256, "size": size, "pointerSize": 134}}

    def _lfs(self, info: Mapping[str, Any]) -> dict[str, Any] | None:
        lfs = info.get("lfs")
        return lfs and {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 134}

    def resolve(self, key: str, revision: str, name: str, token: str | None) -> None:
        found = self._repo(key, revision)
        if found is None:
            return
        repo, commit = found
        if self._refused(repo, token):
            return
        if name not in repo.commits[commit]:
            self.reply(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        else:
            data = repo.commits[commit][name]
            info = self._info(repo, name, data)
            if "lfs" not in info:
                self.reply_file(data, ETag=f'"{info["oid"]}"', X_Repo_Commit=commit)
                return
            digest = info["lfs"]["oid"]
            self.hub.blobs[digest] = data
            linked = {"X_Linked_ETag": f'"{digest}"', "X_Linked_Size": str(len(data)), "X_Repo_Commit": commit}
            self.reply(302, b"", Location=f"{self.hub.cdn}/blob/{digest}?{SIGNATURE}", **linked)

    def _refused(self, repo: Repo, token: str | None) -> bool:
        refused = repo.gated and token != GOOD_TOKEN
        if refused:
            self.reply(401 if token is None else 403, b"{}", X_Error_Code="GatedRepo")
        return refused

    def reply_file(self, data: bytes, **headers: str) -> None:
        common = {**headers, "Accept_Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        status, start, end = 200, 0, len(data) - 1
        if asked is not None and not self.fault.ignores_range:
            status, start, end = 206, int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            common["Content_Range"] = f"bytes {start}-{end}/{len(data)}"
        part = data[start : end + 1]
        if self.fault.flips_a_bit:
            part = bytes([part[0] ^ 1]) + part[1:]
        self.reply(status, part, **common)

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault.cut_after is not None:
            body, self.close_connection = body[: self.fault.cut_after], True
        try:
            self.wfile.write(body)
            self.hub.num_body_bytes += len(body)
        except (BrokenPipeError, ConnectionResetError):  # the client had enough, or was killed
            self.close_connection = True
