"""The pages that assets wrote, galleries and reports, over the board's address: Dagster's pages link them."""

import re
from pathlib import Path

from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mllm_assets.artifacts import is_complete
from mllm_assets.data.curate.sample_page import REPORT, SAMPLES
from mllm_assets.data.ingest.images import EXTENSIONS
from mllm_assets.inference.addresses import PAGES
from mllm_assets.layout import Layout

NAME = r"(?!\.+/)[\w.-]+"
VERSION = rf"data/\.versions/{NAME}/{NAME}"
PAGE = re.compile(
    rf"outputs/{NAME}/predictions/{NAME}/gallery\.html|cache/evaluations/{NAME}/gallery\.html|data/\.quality/{NAME}/{NAME}/report\.html|{VERSION}/{REPORT}"
)
# what a version's report reads; the other pages hold their own pictures
PICTURE = re.compile(rf"data/images/[\w-]+\.(?:{'|'.join(EXTENSIONS.values())})")
SCRIPT = re.compile(rf"{VERSION}/{SAMPLES}")
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


class WrittenPages:
    """Answers what begins with /pages/ and hands on all else."""

    def __init__(self, app: ASGIApp, layout: Layout) -> None:
        self._app = app
        self._layout = layout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request of Starlette's."""
        if scope["type"] == "http" and scope["path"].startswith(PAGES):
            await self._answer(scope["path"].removeprefix(PAGES), scope["method"])(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _answer(self, name: str, method: str) -> Response:
        if method not in ("GET", "HEAD"):
            return PlainTextResponse("only GET", status_code=405, headers=HEADERS)
        if page := find_page(self._layout, name):
            headers = {**HEADERS, "Content-Security-Policy": _policy(reads_files=bool(re.match(VERSION, name)))}
            return FileResponse(page, headers=headers)
        root = self._layout.root
        text = f"The board's project {root.name} has no such page: it was deleted, or is of another project."
        return PlainTextResponse(text, status_code=404, headers=HEADERS)


def _policy(*, reads_files: bool) -> str:
    """What a page may load: what it holds, and where it is a version's report, pictures and the script beside it."""
    own = "'self' " if reads_files else ""
    return (
        f"default-src 'none'; img-src {own}data:; style-src 'unsafe-inline'; script-src {own}'unsafe-inline'; "
        "frame-ancestors 'none'"
    )


def find_page(layout: Layout, name: str) -> Path | None:
    """The file of a page, or of what it reads, by its path below the root.

    None where there is none, where its artefact is not complete, and where it leads out of the project.
    """
    if not any(kind.fullmatch(name) for kind in (PAGE, PICTURE, SCRIPT)):
        return None
    page, root = layout.root / name, layout.root.resolve()
    if not page.is_file() or not page.resolve().is_relative_to(root):
        return None
    return page if PICTURE.fullmatch(name) or is_complete(page.parent) else None


def samples_address(layout: Layout, dataset: str) -> str | None:
    """Where the board has the page of all samples of a dataset's current version."""
    version = (layout.data / dataset).resolve()
    if not version.is_relative_to(layout.root.resolve()):
        return None
    name = (version / REPORT).relative_to(layout.root.resolve()).as_posix()
    return PAGES + name if find_page(layout, name) else None
