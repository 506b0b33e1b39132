"""The pages that assets wrote, galleries and quality reports, over the board's address: Dagster's pages link them."""

import re
from pathlib import Path

from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mllm_assets.artifacts import is_complete
from mllm_assets.inference.addresses import PAGES
from mllm_assets.layout import Layout

# both hold their own pictures; the report of all samples needs those of the dataset, and the tab Samples shows them
NAME = r"(?!\.+/)[\w.-]+"
SERVED = re.compile(rf"outputs/{NAME}/predictions/{NAME}/gallery\.html|data/\.quality/{NAME}/{NAME}/report\.html")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


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
            return FileResponse(page, media_type="text/html; charset=utf-8", headers=HEADERS)
        root = self._layout.root
        text = f"The board's project {root.name} has no such page: it was deleted, or is of another project."
        return PlainTextResponse(text, status_code=404, headers=HEADERS)


def find_page(layout: Layout, name: str) -> Path | None:
    """The file of a page by its path below the root; None where it is none, or leads out of the project."""
    if not SERVED.fullmatch(name):
        return None
    page, root = layout.root / name, layout.root.resolve()
    is_whole = is_complete(page.parent) and page.is_file() and page.resolve().is_relative_to(root)
    return page if is_whole else None
