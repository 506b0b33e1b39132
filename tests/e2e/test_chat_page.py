"""The chat page, in a real browser, on tiny models."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from tests.e2e.conftest import serving
from tests.integration.conftest import wait_for

pytest.importorskip("gradio")
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
GOLDEN = Path(__file__).parents[1] / "golden" / "parity"
ENTRY = "gemma3_vlm_val"
SAID = re.compile(r"\S.*\d+ tokens? in \d+\.\d\d s", re.DOTALL)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page with two models of the same weights, and the samples of an entry."""
    root = tmp_path_factory.mktemp("chat")
    shutil.copytree(GOLDEN / "data", root / "data")
    for name in ("base", "tuned"):
        shutil.copytree(GOLDEN / "model", root / "pretrains" / name)
    environment = {**os.environ, "MLLM_ASSETS_ROOT": str(root), "OMP_NUM_THREADS": "1"}
    with serving(
        "chat", "pretrained/base", "pretrained/tuned", "--samples", ENTRY, cwd=root, env=environment
    ) as address:
        yield address


def answer_of(page: Page, model: int) -> Locator:
    return page.locator(f"#answers-{model}").get_by_test_id("bot")


def test_a_picked_sample_is_asked_of_both_models_and_nothing_leaves_the_machine(page: Page, address: str) -> None:
    hosts: list[str] = []
    page.on("request", lambda request: hosts.append(request.url) if request.url.startswith("http") else None)
    page.goto(address)
    expect(page.get_by_text(f"Samples of {ENTRY}")).to_be_visible()
    page.locator(".grid-container button, button.thumbnail-item").nth(1).click()
    question = page.get_by_label("Question")
    expect(question).not_to_be_empty()
    assert wait_for(lambda: page.get_by_label("Reference").input_value(), "the reference")
    page.get_by_role("button", name="Ask", exact=True).click()
    for number in (0, 1):
        expect(answer_of(page, number)).to_have_text(SAID)
    first, second = (re.split(r"\d+ tokens? in", answer_of(page, number).inner_text())[0] for number in (0, 1))
    assert first == second
    assert [url for url in hosts if not url.startswith(address)] == []


def test_the_reference_of_a_sample_goes_when_another_image_comes(page: Page, address: str, tmp_path: Path) -> None:
    """It stayed, so that a reader compared the answers with that of another image."""
    page.goto(address)
    page.locator(".grid-container button, button.thumbnail-item").nth(1).click()
    assert wait_for(lambda: page.get_by_label("Reference").input_value(), "the reference")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(answer_of(page, 1)).to_have_text(SAID)
    page.get_by_label("Remove Image").first.click()
    expect(page.get_by_label("Reference")).to_have_value("")
    expect(answer_of(page, 1)).to_have_count(0)
    page.locator(".grid-container button, button.thumbnail-item").nth(2).click()
    assert wait_for(lambda: page.get_by_label("Reference").input_value(), "the reference")
    page.get_by_label("Remove Image").first.click()
    page.locator("input[type=file]").first.set_input_files(GOLDEN / "data" / "images" / "emoji_000.png")
    expect(page.get_by_label("Reference")).to_have_value("")


def test_an_image_too_large_to_decode_is_explained(page: Page, address: str, tmp_path: Path) -> None:
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")
    page.goto(address)
    page.locator("input[type=file]").first.set_input_files(tmp_path / "large.png")
    page.get_by_label("Question").fill("What?")
    expect(page.get_by_label("Remove Image").first).to_be_visible()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_text("has 10000 x 9000 pixels, expected at most 89,478,485").first).to_be_visible()


@pytest.mark.attack("HTTP")
def test_only_pictures_that_were_shown_are_served(address: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The whole folder data/, with quality.duckdb in it, was served beside the samples."""
    info = tmp_path_factory.getbasetemp() / "chat0" / "data" / "dataset_info.json"
    assert info.is_file()
    assert httpx.get(f"{address}/gradio_api/file={info}").status_code == 403


def test_another_name_for_this_machine_reaches_no_page(address: str) -> None:
    assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 400
    assert httpx.get(address, headers={"Host": f"localhost:{address.rpartition(':')[2]}"}).status_code == 200


def test_a_question_that_cannot_be_asked_is_explained(page: Page, address: str) -> None:
    page.goto(address)
    page.get_by_label("Question").fill("What <end_of_turn>?")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_text("holds '<end_of_turn>', which steers the model").first).to_be_visible()
