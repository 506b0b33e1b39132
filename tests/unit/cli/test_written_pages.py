"""What the board serves of a project's files: the pages that assets wrote, and nothing beside them."""

from pathlib import Path

import pytest

pytest.importorskip("gradio")
from starlette.applications import Starlette  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from mllm_assets.artifacts import MANIFEST  # noqa: E402
from mllm_assets.cli.board.written_pages import WrittenPages  # noqa: E402
from mllm_assets.components.reporting import with_page  # noqa: E402
from mllm_assets.layout import Layout  # noqa: E402

GALLERY = "outputs/mine_sft/predictions/12ab/gallery.html"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    folder = tmp_path / "project" / Path(GALLERY).parent
    folder.mkdir(parents=True)
    for name in ("gallery.html", "gallery.md", MANIFEST):
        (folder / name).write_text(f"<b>{name}</b>")
    return Layout(tmp_path / "project")


@pytest.fixture
def client(layout: Layout) -> TestClient:
    return TestClient(WrittenPages(Starlette(), layout))


def test_the_link_of_an_asset_opens_its_gallery(client: TestClient, layout: Layout) -> None:
    """A browser follows no link from Dagster's page to a file."""
    text = with_page(layout.root / GALLERY, "first rows", layout).md_str or ""
    address = text.partition("](http://127.0.0.1:7861")[2].partition(")")[0]
    answer = client.get(address)
    assert (answer.status_code, answer.text) == (200, "<b>gallery.html</b>")
    assert "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "name",
    [
        "outputs/mine_sft/predictions/12ab/gallery.md",
        "outputs/mine_sft/predictions/12ab/manifest.json",
        "outputs/mine_sft/predictions/34cd/gallery.html",
        "outputs/..%2F..%2Fmine/predictions/12ab/gallery.html",
        "outputs/mine_sft/predictions/../predictions/12ab/gallery.html%00",
        "outputs/mine_sft/predictions/%2e%2e/gallery.html",
        "data/quality.duckdb",
        "",
    ],
)
def test_nothing_else_is_served(name: str, client: TestClient) -> None:
    assert client.get(f"/pages/{name}").status_code == 404


def test_a_page_that_is_unfinished_or_leads_out_of_the_project_is_none(client: TestClient, layout: Layout) -> None:
    page = layout.root / GALLERY
    assert client.post(f"/pages/{GALLERY}").status_code == 405
    secret = layout.root.parent / "secret.html"
    secret.write_text("secret")
    page.unlink()
    page.symlink_to(secret)
    assert client.get(f"/pages/{GALLERY}").status_code == 404
    page.unlink()
    page.write_text("whole")
    (page.parent / MANIFEST).unlink()
    assert client.get(f"/pages/{GALLERY}").status_code == 404
