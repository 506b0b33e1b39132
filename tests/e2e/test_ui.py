"""The journeys that matter, in a real browser against a real `dagster dev`."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.integration.conftest import Project, copied_project, emoji_ready, line_ready, wait_for
from tests.integration.dagster_dev import Server, loaded_location, serving
from tests.processes import WORKER, processes_of, those_that_run
from tests.unit.data.made_datasets import picture

__all__ = ["emoji_ready", "line_ready"]  # fixtures
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]


GROUPS = ("emoji", "pretrained", "mine")


@pytest.fixture(scope="module")
def project(line_ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A trained recipe whose gate failed, and one that would train for long."""
    with copied_project(line_ready, tmp_path_factory.mktemp("ui") / "project") as project:
        project.write_recipe("long", max_steps=5000, eval_strategy="steps", eval_steps=5)
        project.set_defaults(gates={"min_answer_gain": 0.9})
        project.materialize('key:"mine/eval_metrics"').communicate(timeout=500)
        yield project


@pytest.fixture(scope="module")
def server(project: Project) -> Iterator[Server]:
    with serving(project, "-m", f"{project.package}.definitions") as server:
        loaded_location(server)
        yield server


def test_the_graph_shows_one_line_in_its_groups(server: Server, page: Page) -> None:
    expanded = ",".join(f"global@global:{group}" for group in GROUPS)
    line = quote('+key:"mine/released_model"', safe="")
    page.goto(f"{server.url}/asset-groups~{line}/?expanded={quote(expanded)}")
    graph = page.locator("svg")
    for text in (*GROUPS, "sample_quality", "checkpoint", "eval_metrics"):
        expect(graph.get_by_text(text, exact=True).first).to_be_visible()


def test_a_checkpoint_shows_what_trained_and_the_plot_of_its_loss_opens(server: Server, page: Page) -> None:
    page.goto(f"{server.url}/assets/mine/checkpoint")
    for text in ("num_steps", "trainable", "recipe: mine", "PyTorch"):
        expect(page.get_by_text(text, exact=True).first).to_be_visible()
    open_markdown(page, "training_loss")


def test_the_gallery_opens(server: Server, page: Page) -> None:
    page.goto(f"{server.url}/assets/mine/predictions")
    open_markdown(page, "gallery")
    expect(page.get_by_text("right answer", exact=True).first).to_be_visible()


def open_markdown(page: Page, key: str) -> None:
    """Open a piece of metadata, and see that its first picture was drawn."""
    picture = window(page, key).locator("img").first
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") > 0


def window(page: Page, key: str) -> Locator:
    """Open the window of a piece of metadata."""
    page.locator("tr", has=page.get_by_text(key, exact=True)).get_by_text("Show Markdown").first.click()
    return page.get_by_role("dialog")


# of each asset of the line: what is behind "Show Markdown", and a text or a picture in it
PAGES = {
    "emoji/raw": {"rows": "img"},
    "emoji/sample_quality": {"report": "img"},
    "emoji/corrections": {},
    "emoji/train": {"rows": "img", "details": "text=report_path"},
    "emoji/val": {"rows": "img"},
    "emoji/test": {"rows": "img"},
    "emoji/dataset_info": {},
    "pretrained/gemma3_tiny": {},
    "mine/vision_features": {},
    "mine/checkpoint": {"training_loss": "img", "trainable": "text=language_model.embed_tokens"},
    "mine/predictions": {"gallery": "text=tuned model", "details": "text=weights_digest"},
    "mine/eval_metrics": {
        "metrics": "text=label_accuracy",
        "confusion": "img",
        "gates": "text=beats_most_common_answer",
    },
    "mine/released_model": {"model_card": "text=label_accuracy", "gates": "text=beats_most_common_answer"},
}
TOO_WIDE = """tables => tables.map(table => [table, table.closest("td, [role=dialog]")]).filter(([table, column]) => {
    if (!column) return false;
    const box = table.closest("[class*=ScrollContainer]") ?? column;
    return table.getBoundingClientRect().right > Math.min(box.getBoundingClientRect().right, innerWidth) + 1;
}).map(([table]) => table.innerText.slice(0, 80))"""


CUT = """rows => rows.filter(row => {
    const right = row.closest("[class*=ScrollContainer]").getBoundingClientRect().right;
    const texts = document.createTreeWalker(row.lastElementChild, NodeFilter.SHOW_TEXT), range = document.createRange();
    while (texts.nextNode()) {
        range.selectNodeContents(texts.currentNode);
        if (range.getBoundingClientRect().right > right) return true;
    }
}).map(row => row.innerText)"""


@pytest.mark.parametrize("width_px", [1440, 1280])
def test_no_table_value_or_picture_of_an_assets_page_is_wider_than_its_column(
    server: Server, page: Page, width_px: int
) -> None:
    """Eight columns of metrics, the confusion matrix, the gates' sentences, paths and digests went off the screen."""
    page.set_viewport_size({"width": width_px, "height": 1000})
    for asset, windows in PAGES.items():
        page.goto(f"{server.url}/assets/{asset}")
        expect(page.get_by_text("cost_wall_s", exact=True).first).to_be_visible()
        assert page.locator("td table").evaluate_all(TOO_WIDE) == [], asset
        assert page.locator("[class*=ScrollContainer] tbody > tr").evaluate_all(CUT) == [], asset
        for key, content in windows.items():
            opened = window(page, key)
            expect(opened.locator(content).first).to_be_visible()
            assert opened.locator("table").evaluate_all(TOO_WIDE) == [], f"{asset}: {key}"
            right = opened.locator("img, table, pre").first.evaluate("found => found.getBoundingClientRect().right")
            assert right <= opened.evaluate("found => found.getBoundingClientRect().right"), f"{asset}: {key}"
            page.keyboard.press("Escape")
            expect(opened).to_have_count(0)


def test_a_failed_gate_can_be_read(server: Server, page: Page) -> None:
    page.goto(f"{server.url}/assets/mine/eval_metrics?view=checks&checkDetail=beats_most_common_answer")
    expect(page.get_by_text("the gain in label_accuracy over always answering").first).to_be_visible()
    expect(page.get_by_text("Failed").first).to_be_visible()


def test_a_trial_with_two_changed_keys_is_made_and_listed_by_them(server: Server, page: Page) -> None:
    launch(page, server, "mine/checkpoint", "ops: {mine__checkpoint: {config: {max_steps: 1, learning_rate: 0.003}}}")
    run = wait_for(lambda: launched_run(server, "mine__checkpoint"), "the run")
    assert "max_steps: 1" in run["runConfigYaml"]
    wait_for(lambda: launched_run(server, "mine__checkpoint")["status"] == "SUCCESS", "the run's end")
    page.set_viewport_size({"width": 1280, "height": 1000})
    page.goto(f"{server.url}/runs")
    next_column = page.get_by_text("Target", exact=True).first.bounding_box()
    for tag in ("run: mine", "max_steps: 1", "learning_rate: 0.003"):
        shown = page.get_by_text(tag, exact=True).first.bounding_box()
        assert shown and next_column and shown["x"] + shown["width"] < next_column["x"], "cut at the column's edge"


def test_own_pictures_become_a_dataset_whose_rows_the_page_shows(server: Server, page: Page, project: Project) -> None:
    photos = project.root / "photos"
    photos.mkdir()
    for number in range(12):
        picture(number).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(f"blocks number {number}")
    for command in (("add-dataset", "photos"), ("run", "photos")):
        output, _ = (process := project.start("mllm_assets.cli", *command)).communicate(timeout=900)
        assert process.returncode == 0, output
    page.goto(f"{server.url}/locations")
    page.locator("button", has_text=re.compile("^Reload$")).first.click()
    wait_for(lambda: "photos" in str(server.query("{ assetNodes { assetKey { path } } }")), "the reloaded definitions")
    page.goto(f"{server.url}/assets/photos/train")
    expect(page.get_by_text("cost_wall_s", exact=True).first).to_be_visible()
    open_markdown(page, "rows")
    expect(page.get_by_role("dialog").get_by_text("blocks number").first).to_be_visible()


def test_a_run_in_progress_says_how_far_it_is_and_a_cancelled_one_leaves_nothing(
    server: Server, page: Page, project: Project
) -> None:
    launch(page, server, "long/checkpoint", "ops: {long__checkpoint: {config: {learning_rate: 0.002}}}")
    run = wait_for(lambda: launched_run(server, "long__checkpoint"), "the run")
    page.goto(f"{server.url}/runs/{run['runId']}")
    expect(page.get_by_text(re.compile(r"train \d+/5000, loss [\d.]+.*, .* left")).first).to_be_visible()
    assert slots_taken(server) == 1

    page.get_by_role("button", name="Terminate").click()
    page.get_by_role("dialog").get_by_role("button", name="Terminate 1 run").click()
    wait_for(lambda: launched_run(server, "long__checkpoint")["status"] == "CANCELED", "the run's end")
    assert slots_taken(server) == 0
    assert not those_that_run(WORKER, processes_of(project.root))
    page.goto(f"{server.url}/runs/{run['runId']}")
    expect(page.get_by_text("Canceled", exact=True).first).to_be_visible()


def launch(page: Page, server: Server, asset: str, config: str) -> None:
    """Type a configuration into the launchpad of an asset, and start it."""
    page.goto(f"{server.url}/assets/{asset}")
    page.get_by_role("button", name="Materialize").first.click(modifiers=["Shift"])
    editor = page.locator(".CodeMirror").first
    expect(editor).to_be_visible()
    editor.click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(config)
    page.get_by_role("button", name="Materialize").last.click()


def launched_run(server: Server, op: str) -> dict[str, str]:
    """The newest run, if its configuration was typed into the launchpad."""
    query = "{ runsOrError(limit: 1) { ... on Runs { results { runId status runConfigYaml } } } }"
    [run] = server.query(query)["runsOrError"]["results"]
    return run if op in run["runConfigYaml"] else {}


def slots_taken(server: Server) -> int:
    query = "{ instance { concurrencyLimits { concurrencyKey activeSlotCount } } }"
    limits = server.query(query)["instance"]["concurrencyLimits"]
    return sum(limit["activeSlotCount"] for limit in limits if limit["concurrencyKey"] == "gpu")
