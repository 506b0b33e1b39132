"""`mllm-assets review`, as a user and a script call it: decided, taken back, sent to other tools and read from them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from mllm_assets.cli import main
from mllm_assets.components.facts import facts_of
from mllm_assets.data.curate.corrected import settle
from mllm_assets.data.curate.corrections import read_corrections
from mllm_assets.data.curate.review import decisions
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import made_spec, png, run_line, write_source

pytestmark = pytest.mark.not_fast
CORRECTIONS, RAW = dg.AssetKey(["made", "corrections"]), "dagster/input_data_version/made/raw"


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose assets were made, in a history of its own."""
    layout = Layout(tmp_path_factory.mktemp("made"))
    write_source(layout.root, [(png(n), f"picture {n % 3}") for n in range(12)])
    spec = made_spec()
    raw, *_ = run_line(spec, layout)
    settled = settle(spec, layout, raw.directory)
    (layout.root / ".dagster_home").mkdir()
    with dg.DagsterInstance.from_config(str(layout.root / ".dagster_home")) as instance:
        tags = {"dagster/data_version": settled.digest, "dagster/code_version": "c", RAW: raw.digest}
        instance.report_runless_asset_event(dg.AssetMaterialization(CORRECTIONS, tags=tags))
    return layout.root


@pytest.fixture
def made(made_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    layout = Layout(tmp_path / "made")
    shutil.copytree(made_once, layout.root, symlinks=True)
    for name, value in (("MLLM_ASSETS_ROOT", layout.root), ("DAGSTER_HOME", layout.root / ".dagster_home")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(layout.root)
    return layout


@pytest.fixture
def review(made: Layout, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Call the command; returns its exit code and what it printed, of `--json` the values."""

    def call(*arguments: str) -> Any:
        capsys.readouterr()
        code = main(["review", "made", *arguments])
        out, err = capsys.readouterr()
        return json.loads(out) if "--json" in arguments else (code, out + err)

    return call


def latest(layout: Layout) -> tuple[dict[str, str], dict[str, Any]]:
    with dg.DagsterInstance.get() as instance:
        event = instance.get_latest_materialization_event(CORRECTIONS)
        assert event and event.asset_materialization
        made = event.asset_materialization
        return dict(made.tags or {}), facts_of(made.metadata)


def test_samples_are_listed_decided_about_and_all_of_it_is_taken_back(made: Layout, review: Callable[..., Any]) -> None:
    listed = review("list", "--split", "train", "--json")
    assert len(listed) == 8 and listed[0]["answer"].startswith("picture ") and not listed[0]["decision"]
    first, second, third = (row["sample"] for row in listed[:3])
    before, _ = latest(made)
    code, shown = review("relabel", first, "--to", "a cup", "--why", "look at it", "--who", "Ada")
    assert code == 0 and f"{first}: relabel to 'a cup' by Ada on 20" in shown and "mllm-assets run made" in shown
    assert review("drop", second, f"{third}-2", "--who", "Ada")[0] == 0
    assert review("keep", listed[3]["sample"], "--who", "Grace")[0] == 0

    tags, facts = latest(made)
    assert tags["dagster/data_version"] != before["dagster/data_version"] and tags[RAW] == before[RAW]
    assert [facts[f"num_{what}"] for what in ("relabelled", "dropped", "kept", "unmatched")] == [1, 2, 1, 0]
    assert "a cup" in facts["newest"] and "look at it" in facts["newest"]
    assert {row["sample"] for row in review("list", "--json") if row["decision"]} >= {first, second, third}
    assert "relabel to 'a cup' by Ada" in review("history", first)[1]

    assert review("undo", first, second, third, "--who", "Ada")[0] == 0
    assert latest(made)[0] == before, "the splits are those of before"
    assert list(decisions(made, "made")) == [listed[3]["sample"]] and len(read_corrections(made, "made")) == 7


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["drop"], "drop which? Give ids"),
        (["drop", "x"], "'x' is no sample's id"),
        (["drop", "0" * 16], f"made has no sample {'0' * 16}. See them: mllm-assets review made list"),
        (["undo", "0" * 16], "nothing to undo"),
        (["relabel", "{first}"], "relabel needs --to TEXT"),
        (["drop", "{first}", "--to", "a"], "nothing else has it"),
        (["relabel", "{first}", "--to", "{answer}"], "in its source already. keep says that it is right"),
        (["relabel", "{first}", "--to", "<image>"], "control token"),
        (["relabel", "{first}", "--to", "x" * 9000], "cannot be trained on (caption_too_long)"),
        (["import"], "import needs one file"),
        (["import", "none.json"], "cannot be read"),
    ],
)
def test_what_cannot_be_decided_is_refused_with_what_to_do(
    review: Callable[..., Any], made: Layout, arguments: list[str], expected: str
) -> None:
    row = review("list", "--json")[0]
    given = [text.replace("{first}", row["sample"]).replace("{answer}", row["answer"]) for text in arguments]
    code, shown = review(*given)
    assert code == 2 and expected in shown
    assert not decisions(made, "made")


def test_a_dataset_that_was_never_made_says_how_to_make_it(made: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["review", "mad", "drop", "0" * 16]) == 2
    assert "mad has no samples to review yet. Make it: mllm-assets run mad" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["label-studio", "fiftyone"])
def test_what_another_tool_changed_comes_back_once(tool: str, made: Layout, review: Callable[..., Any]) -> None:
    first, second, third = (row["sample"] for row in review("list", "--json")[:3])
    review("drop", third)
    assert review("export", "out.json", "--as", tool)[1].startswith("12 samples are in out.json")
    path = made.root / "out.json"
    written = json.loads(path.read_text())
    answers = {"choices": ["a cup"]}
    if tool == "label-studio":
        items = {task["data"]["sample_id"]: task for task in written}
        assert (made.data / items[first]["data"]["image"].partition("?d=")[2]).is_file()
        assert '<Choice value="picture 1"/>' in path.with_suffix(".xml").read_text()
        assert items[third]["annotations"][0]["result"][0]["value"] == {"choices": ["drop"]}
        old = {"result": [result("answer", {"choices": ["wrong"]})], "updated_at": "2026-01-01T00:00:00Z"}
        new = {"result": [result("answer", answers)], "updated_at": "2026-02-01T00:00:00Z",
               "completed_by": {"email": "ada@example.org"}, "was_cancelled": False}  # fmt: skip
        skipped = {"result": [], "updated_at": "2026-03-01T00:00:00Z", "was_cancelled": True}
        items[first]["annotations"] = [new, old, skipped]
        items[second]["annotations"] = [{"result": [result("verdict", {"choices": ["keep"]})]}]
    else:
        items = {sample["content_id"]: sample for sample in written["samples"]}
        assert (made.data / items[first]["filepath"]).is_file() and items[third]["tags"] == ["drop"]
        assert written["sample_fields"]["ground_truth"].endswith("(fiftyone.core.labels.Classification)")
        items[first]["ground_truth"]["label"] = "a cup"
        items[second]["tags"] = ["seen", "keep"]
    path.write_text(json.dumps(written))
    assert review("import", "out.json", "--as", tool, "--who", "Grace")[1].startswith("2 imported, 1 as decided before")
    found = decisions(made, "made")
    assert (found[first].action, found[first].new, found[second].action) == ("relabel", "a cup", "keep")
    assert found[first].who == ("Label Studio's ada@example.org" if tool == "label-studio" else "Grace")
    assert review("import", "out.json", "--as", tool)[1].startswith("0 imported, 3 as decided before")


def result(control: str, value: dict[str, list[str]]) -> dict[str, Any]:
    return {"from_name": control, "to_name": "image", "type": "choices", "value": value}


def test_the_short_form_of_label_studio_is_read_and_an_answer_that_a_person_confirmed_is_kept(
    made: Layout, review: Callable[..., Any]
) -> None:
    rows = review("list", "--json")[:3]
    items = [{"sample_id": row["sample"], "source_answer": row["answer"], "annotator": 3} for row in rows]
    items[0] |= {"answer": rows[0]["answer"]}
    items[1] |= {"answer": {"text": ["written"]}}
    items[2] |= {"answer": "both", "verdict": "drop"}
    (made.root / "min.json").write_text(json.dumps([*items, {"sample_id": "0" * 16, "answer": "x"}, {"other": 1}]))
    assert review("import", "min.json")[1].startswith(
        "3 imported, 0 as decided before, 1 without a decision, 1 of no sample of made"
    )
    assert [decisions(made, "made")[row["sample"]].action for row in rows] == ["keep", "relabel", "drop"]


@pytest.mark.attack("JSON")
@pytest.mark.parametrize(
    ("tool", "text", "expected"),
    [
        ("label-studio", "{}", "expected a list"),
        ("label-studio", "[1]", "item 1: not an item that label-studio writes"),
        ("label-studio", '[{"data": {"sample_id": 3}, "annotations": [{"result": []}]}]', "expected a text, got int"),
        ("label-studio", '[{"data": {"sample_id": "../x"}, "annotations": [{"result": []}]}]', "is no sample's id"),
        ("label-studio", '[{"sample_id": "{first}", "answer": "a<end_of_turn>"}]', "item 1: .*control token"),
        ("label-studio", '[{"sample_id": "{first}", "answer": "\\u001b[2J"}]', "item 1: .*control character"),
        ("label-studio", '[{"sample_id": "{first}", "answer": "a", "updated_at": "now"}]', "Invalid isoformat"),
        ("label-studio", '[{"sample_id": "{first}", "sample_id": "x"}]', "is there twice"),
        ("label-studio", "[" * 100_000, "nested too deeply|expected a list"),
        ("fiftyone", "[]", "expected an object"),
        ("fiftyone", '{"samples": [[]]}', "item 1: not an item that fiftyone writes"),
        ("fiftyone", '{"samples": [{"content_id": "{first}", "ground_truth": {"label": ["a"]}}]}', "got list"),
    ],
)
def test_a_file_of_another_form_imports_nothing_and_says_where(
    tool: str, text: str, expected: str, made: Layout, review: Callable[..., Any]
) -> None:
    first = review("list", "--json")[0]["sample"]
    Path("bad.json").write_text(text.replace("{first}", first))
    code, shown = review("import", "bad.json", "--as", tool)
    assert code == 2, shown
    assert [None for part in expected.split("|") if part.partition(".*")[2] in shown and "bad.json" in shown], shown
    assert not decisions(made, "made")
