"""What the board serves of a project's files: the pages that assets wrote, and nothing beside them."""

from pathlib import Path

import pytest

pytest.importorskip("gradio")
from starlette.applications import Starlette  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from mllm_assets.artifacts import MANIFEST  # noqa: E402
from mllm_assets.cli.board.written_pages import WrittenPages, samples_address  # noqa: E402
from mllm_assets.components.reporting import with_page  # noqa: E402
from mllm_assets.layout import Layout  # noqa: E402

GALLERY = "outputs/mine_sft/predictions/12ab/gallery.html"
VERSION = "data/.versions/mine/34cd"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    folder = tmp_path / "project" / Path(GALLERY).parent
    folder.mkdir(parents=True)
    for name in ("gallery.html", "gallery.md", MANIFEST):
        (folder / name).write_text(f"<b>{name}</b>")
    version = [f"{VERSION}/{name}" for name in ("report.html", "report_samples.js", MANIFEST)]
    for name in (*version, "data/images/1a.png"):
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "project" / "data" / "mine").symlink_to(".versions/mine/34cd")
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
    assert "'self'" not in answer.headers["content-security-policy"]


def test_the_page_of_all_samples_opens_with_its_script_and_pictures(client: TestClient, layout: Layout) -> None:
    """It was a path that no browser follows."""
    address = samples_address(layout, "mine") or ""
    assert address == f"/pages/{VERSION}/report.html"
    assert address in (with_page((layout.data / "mine").resolve() / "report.html", "", layout).md_str or "")
    answer = client.get(address)
    assert answer.text == f"{VERSION}/report.html"
    assert "img-src 'self' data:" in answer.headers["content-security-policy"]
    for name, kind in ((f"{VERSION}/report_samples.js", "text/javascript"), ("data/images/1a.png", "image/png")):
        found = client.get(f"/pages/{name}")
        assert (found.text, found.headers["content-type"].partition(";")[0]) == (name, kind)
    (layout.root / VERSION / MANIFEST).unlink()
    assert samples_address(layout, "mine") is None and samples_address(layout, "../..") is None


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
        f"{VERSION}/manifest.json",
        f"{VERSION}/train.json",
        "data/mine/report.html",
        "data/images/../quality.duckdb",
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
