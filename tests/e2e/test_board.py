"""The board, in a real browser: runs compared, a trial and a long run started, one stopped, each tab looked at."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from mllm_assets.data.curate.corrections import read_corrections
from mllm_assets.releases.approvals import read_decisions
from tests.e2e.conftest import serving
from tests.integration.conftest import Project, copied_project, emoji_ready, line_ready, wait_for
from tests.processes import WORKER, processes_of, those_that_run

__all__ = ["emoji_ready", "line_ready"]  # fixtures
pytest.importorskip("gradio")
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def project(line_ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A recipe that was evaluated, two trials of it with other values, and one that would train for long."""
    with copied_project(line_ready, tmp_path_factory.mktemp("board") / "project") as project:
        project.write_recipe("long", max_steps=5000, save_steps=100)
        project.set_defaults(gates={"min_answer_gain": 0.9})
        project.materialize('key:"mine/eval_metrics"').communicate(timeout=500)
        for rate in ("2e-3", "4e-3"):
            training = project.start("mllm_assets.cli", "train", "configs/mine.yaml", f"learning_rate={rate}")
            assert training.wait(900) == 0
        yield project


@pytest.fixture(scope="module")
def address(project: Project) -> Iterator[str]:
    with serving("board", cwd=project.root, env=project.env) as address:
        yield address


def open_tab(page: Page, address: str, name: str) -> list[str]:
    """Open a tab; returns the addresses that the page asks from then on."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.url.startswith("http") else None)
    page.goto(address)
    page.get_by_role("tab", name=name, exact=True).click()
    return asked


def choose(page: Page, label: str, option: str | re.Pattern[str]) -> None:
    page.get_by_label(label, exact=True).first.click()
    page.get_by_role("option", name=option).first.click()


def test_samples_are_filtered_and_searched_and_nothing_leaves_the_machine(page: Page, address: str) -> None:
    asked = open_tab(page, address, "Samples")
    expect(page.get_by_text("800 samples")).to_be_visible()
    picture = page.locator(".board-card img").first
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") > 0
    choose(page, "Split", "val")
    expect(page.get_by_text("120 samples")).to_be_visible()
    page.get_by_label("Search").fill("melon")
    expect(page.locator(".board-card")).to_have_count(0)
    choose(page, "Split", "all")
    expect(page.locator(".board-card").first).to_contain_text("melon")
    with page.expect_popup() as opened:
        page.get_by_role("link", name="as a page of its own").click()
    expect(opened.value.get_by_text("800 samples, page 1 of 17")).to_be_visible()
    picture = opened.value.locator(".card img").first
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") > 0
    assert [url for url in asked if not url.startswith(address)] == []


def test_three_runs_are_compared(page: Page, address: str) -> None:
    open_tab(page, address, "Runs")
    for rate in ("0.002", "0.004"):
        expect(page.locator("thead th", has_text=f"mine learning_rate={rate}")).to_be_visible()
    expect(page.locator(".board-table thead th")).to_have_count(4)
    expect(page.locator(".board-curves polyline[data-run]")).to_have_count(3)
    rates = page.locator("tr", has=page.get_by_role("rowheader", name="learning_rate", exact=True)).locator("td")
    assert sorted(rates.all_inner_texts()) == ["0.001", "0.002", "0.004"]
    gate = page.locator("tr", has=page.get_by_role("rowheader", name="beats_most_common_answer")).locator("td")
    assert sorted(text.partition(" ")[0] for text in gate.all_inner_texts()) == ["failed", "–", "–"]
    for width in (1440, 1280):
        page.set_viewport_size({"width": width, "height": 1000})
        table = page.locator(".board-table")
        assert table.evaluate("table => table.scrollWidth <= table.clientWidth"), f"cut off at {width} px"


def test_what_two_models_answer_is_shown_side_by_side(page: Page, address: str) -> None:
    open_tab(page, address, "Gallery")
    expect(page.locator(".board-card:visible")).to_have_count(12)
    expect(page.locator(".board-card:visible").first.locator(".answer")).to_have_count(2)
    choose(page, "Which samples", "both are wrong")
    expect(page.locator(".board-card:visible .answer.right")).to_have_count(0)  # other tabs have answers too


def test_a_model_is_asked_twice_in_one_conversation(page: Page, address: str) -> None:
    open_tab(page, address, "Chat")
    question, answers = page.get_by_label("Question"), page.locator("#answers-0")
    for number, text in enumerate(("What kind of emoji is this?", "And what is its <b>colour</b>?"), start=1):
        question.fill(text)
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(answers.get_by_text(re.compile(r"\d+ tokens? in \d+\.\d\d s"))).to_have_count(number)
        expect(question).to_have_value("")
    expect(answers.get_by_text("And what is its <b>colour</b>?")).to_be_visible()
    page.get_by_role("button", name="Unload models").click()
    expect(page.get_by_text("1 model unloaded.")).to_be_visible()
    page.get_by_label("Models, one to three").click()
    expect(page.get_by_role("option", name=re.compile(r"checkpoint-\d+$")).first).to_be_visible()


def test_a_recipe_is_estimated_and_its_rows_are_shown(page: Page, address: str) -> None:
    open_tab(page, address, "Start")
    expect(page.get_by_text("model_name_or_path").first).to_be_visible()  # the draft is there
    page.get_by_role("button", name="Estimate and show rows").click()
    expect(page.get_by_text(re.compile(r"memory: about \d"))).to_be_visible()
    expect(page.locator(".board-look .board-card")).to_have_count(3)
    expect(page.locator(".board-look mark").first).to_contain_text("<end_of_turn>")


def test_a_copy_of_a_recipe_is_edited_under_a_name_of_its_own(page: Page, address: str, project: Project) -> None:
    """What was edited was lost when the name was changed after it."""
    open_tab(page, address, "Start")
    expect(page.get_by_text("model_name_or_path").first).to_be_visible()
    choose(page, "Or start a recipe of configs/", "mine")
    page.get_by_role("button", name="Edit a copy").click()
    expect(page.get_by_label("Name", exact=True)).to_have_value("mine_2")
    expect(page.get_by_text("outputs/mine_2")).to_be_visible()
    page.locator(".cm-content").first.click()
    page.keyboard.press("Control+End")
    page.keyboard.type("\nweight_decay: 0.125\n")
    page.get_by_label("Name", exact=True).fill("theirs")
    expect(page.get_by_text("outputs/theirs")).to_be_visible()
    page.get_by_role("button", name="Write the recipe").click()
    expect(page.get_by_text("wrote configs/theirs.yaml")).to_be_visible()
    copied, original = (project.root / "configs" / f"{name}.yaml" for name in ("theirs", "mine"))
    assert "weight_decay: 0.125" in copied.read_text()
    assert set(original.read_text().splitlines()) - set(copied.read_text().splitlines()) <= {"output_dir: outputs/mine"}


def test_a_trial_with_two_other_values_is_started_and_compared(page: Page, address: str) -> None:
    open_tab(page, address, "Start")
    choose(page, "Or start a recipe of configs/", "mine")
    page.get_by_label("with other values").fill("max_steps=1 learning_rate=3e-3")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_text("ended with failed gates or assets", exact=True)).to_be_visible()
    expect(page.get_by_label("Log")).to_have_value(re.compile("beats_most_common_answer failed"))
    expect(page.get_by_label("Log")).to_have_value(
        re.compile(r"^\$ mllm-assets run mine max_steps=1 learning_rate=3e-3")
    )
    open_tab(page, address, "Runs")
    trial = "mine max_steps=1 learning_rate=0.003"
    expect(page.locator("thead th", has_text=trial)).to_be_visible()
    names = [text.partition("\n")[0] for text in page.locator(".board-table thead th").all_inner_texts()]
    for row, value in (("learning_rate", "0.003"), ("max_steps", "1"), ("beats_most_common_answer", "failed")):
        texts = page.locator("tr", has=page.get_by_role("rowheader", name=row, exact=True)).locator("td")
        assert texts.all_inner_texts()[names.index(trial) - 1].startswith(value)


def test_a_run_is_started_and_stopped_from_the_board(page: Page, address: str, project: Project) -> None:
    open_tab(page, address, "Start")
    choose(page, "Or start a recipe of configs/", "long")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_label("Log")).to_have_value(re.compile("long/checkpoint"))
    wait_for(lambda: list(project.root.glob("outputs/long/*/trainer_log.jsonl")), "the first step")
    open_tab(page, address, "Runs")  # what was started is still there on a page that was loaded again
    expect(page.locator('.board-curves polyline[data-run="long"]')).to_have_count(1)
    page.get_by_role("tab", name="Start", exact=True).click()
    choose(page, "Run", "long")
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.get_by_text("stopped", exact=True)).to_be_visible(timeout=400_000)
    wait_for(lambda: not workers(project.root), "the worker's end")


def workers(root: Path) -> list[int]:
    return [process.pid for process in those_that_run(WORKER, processes_of(root))]


def test_a_person_refuses_and_approves_a_model(page: Page, address: str, project: Project) -> None:
    open_tab(page, address, "Approve")
    gate = page.locator("tr", has=page.get_by_role("rowheader", name="beats_most_common_answer")).locator("td").last
    expect(gate).to_contain_text("failed")
    expect(page.get_by_text("Nobody has decided about this model yet.")).to_be_visible()
    page.get_by_label("Who decides").fill("Grace <b>Hopper</b>")
    page.get_by_role("button", name="Refuse", exact=True).click()
    expect(page.get_by_text("A refusal needs its reason")).to_be_visible()
    page.get_by_label("Why (a refusal needs it)").fill("too few samples")
    page.get_by_role("button", name="Refuse", exact=True).click()
    expect(page.get_by_text(re.compile(r"refused by Grace <b>Hopper</b> on .*: too few samples"))).to_be_visible()
    page.get_by_label("Who decides").fill("Ada")
    page.get_by_role("button", name="Approve", exact=True).click()
    expect(page.get_by_text(re.compile(r"approved by Ada on "))).to_be_visible()
    assert [one.approved for one in read_decisions(project.layout, "mine")] == [False, True]


def test_a_person_reviews_ten_samples_with_keys_and_takes_one_back(page: Page, address: str, project: Project) -> None:
    open_tab(page, address, "Review")
    place = page.locator(".board-place")
    expect(place).to_have_text("1 of 800")
    assert page.locator(".board-review img").evaluate("image => image.naturalWidth") > 0
    page.get_by_label("Who reviews").fill("Ada")
    page.get_by_label("Who reviews").blur()
    for number, key in enumerate("kdkdkdkdk", start=1):
        page.keyboard.press(key)
        expect(place).to_have_text(f"{number + 1} of 800")
    page.get_by_label("New answer (r)").fill("a <b>cup</b>")
    page.get_by_label("New answer (r)").press("Enter")
    page.get_by_role("button", name="Relabel", exact=True).click()
    expect(place).to_have_text("11 of 800")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_text(re.compile(r"relabel to 'a <b>cup</b>' by Ada on "))).to_be_visible()
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".board-review")).to_contain_text("keep by Ada on ")
    page.keyboard.press("u")
    expect(page.get_by_text("Nothing is decided about it.")).to_be_visible()
    made = read_corrections(project.layout, "emoji")
    assert [one.action for one in made] == [*["keep", "drop"] * 4, "keep", "relabel", "undo"]
    assert made[-2].new == "a <b>cup</b>" and made[-1].sample_id == made[-3].sample_id


@pytest.mark.attack("HTTP")
@pytest.mark.parametrize("path", ["data/quality.duckdb", "configs/mine.yaml", "/etc/passwd"])
def test_no_other_file_is_served(address: str, project: Project, path: str) -> None:
    for prefix in ("gradio_api/file=", "file="):
        assert httpx.get(f"{address}/{prefix}{project.root / path}").status_code in (403, 404)
    assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 400
    assert os.path.exists(project.root / path)


def test_any_model_is_evaluated_on_any_entry(page: Page, address: str, project: Project) -> None:
    """A base model on the test split: no recipe asks that, and the judged recipe has its own on val."""
    open_tab(page, address, "Evaluate")
    choose(page, "Model to evaluate", "pretrained/gemma3_tiny")
    page.get_by_label("Samples each (0: all)").fill("8")
    page.get_by_role("button", name="Evaluate", exact=True).click()
    expect(page.get_by_text("emoji_val, 8 samples")).to_be_visible(timeout=120_000)
    row = page.locator("tr:visible", has=page.get_by_role("rowheader", name="label_accuracy", exact=True))
    assert len(row.locator("td").all_inner_texts()) == 2
    with page.expect_popup() as opened:
        page.get_by_role("link", name="all answers as a page").click()
    expect(opened.value.locator("img").first).to_be_visible()
    assert len(list((project.root / "cache" / "evaluations").iterdir())) == 1
