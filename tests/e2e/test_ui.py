"""The journeys that matter, in a real browser against a real `dagster dev`."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.integration.conftest import copied_project, emoji_ready, line_of, wait_for
from tests.integration.dagster_dev import Server, loaded_location, serve

__all__ = ["emoji_ready"]  # a fixture
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def server(emoji_ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A trained recipe whose gate failed."""
    with copied_project(emoji_ready, tmp_path_factory.mktemp("ui") / "project") as project:
        project.write_recipe("mine", max_steps=3, max_samples=16, plot_loss=True)
        project.set_defaults(gates={"min_answer_gain": 0.9})
        project.materialize(line_of("mine", "eval_metrics")).communicate(timeout=240)
        server = serve(project, "-m", f"{project.package}.definitions")
        loaded_location(server)
        yield server
        server.process.send_signal(signal.SIGINT)
        server.process.communicate(timeout=60)


def test_the_graph_renders_with_its_groups(server: Server, page: Page) -> None:
    page.goto(f"{server.url}/asset-groups~")
    for group in ("ingest", "curate", "train", "evaluate", "release"):
        expect(page.get_by_text(group, exact=True).first).to_be_visible()


def test_a_checkpoint_shows_what_trained_and_its_loss(server: Server, page: Page) -> None:
    page.goto(f"{server.url}/assets/mine/checkpoint")
    for text in ("num_steps", "trainable", "language_model.embed_tokens", "training_loss"):
        expect(page.get_by_text(text, exact=True).first).to_be_visible()


def test_a_failed_gate_can_be_read(server: Server, page: Page) -> None:
    page.goto(f"{server.url}/assets/mine/eval_metrics?view=checks&checkDetail=beats_most_common_answer")
    expect(page.get_by_text("the gain in label_accuracy over always answering").first).to_be_visible()
    expect(page.get_by_text("Failed").first).to_be_visible()


def test_a_checkpoint_is_materialised_with_changed_config(server: Server, page: Page) -> None:
    page.goto(f"{server.url}/assets/mine/checkpoint")
    page.get_by_role("button", name="Materialize").first.click(modifiers=["Shift"])
    editor = page.locator(".CodeMirror").first
    expect(editor).to_be_visible()
    editor.click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text("ops: {mine__checkpoint: {config: {max_steps: 2}}}")
    page.get_by_role("button", name="Materialize").last.click()
    run = wait_for(lambda: launched_run(server), "the run", 60)
    assert "max_steps: 2" in run["runConfigYaml"]
    wait_for(lambda: (launched_run(server) or {}).get("status") == "SUCCESS", "the run's end", 90)


def launched_run(server: Server) -> dict[str, str] | None:
    """The newest run, if its configuration was typed into the launchpad."""
    query = "{ runsOrError(limit: 1) { ... on Runs { results { status runConfigYaml } } } }"
    [run] = server.query(query)["runsOrError"]["results"]
    return run if "mine__checkpoint" in run["runConfigYaml"] else None
