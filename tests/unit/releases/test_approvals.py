"""A release waits for a person where the settings say so; a decision is about one model and its answers."""

import json
from pathlib import Path

import pytest

from mllm_assets.artifacts import read_manifest
from mllm_assets.errors import GateError, IntegrityError, RecipeError
from mllm_assets.evaluation.gates import APPROVAL, GateSpec
from mllm_assets.layout import Layout
from mllm_assets.releases.approvals import APPROVALS, Decision, Subject, approval_gate, decide, read_decisions
from mllm_assets.releases.versions import list_releases
from tests.unit.releases.test_publish import make_run, release

pytestmark = pytest.mark.not_fast
WAITS = GateSpec(approval="required")
MODEL = Subject(weights_digest="c" * 64, predictions_digest="p" * 64)  # what `release` releases
YES = Decision(subject=MODEL, approved=True, who="Ada", why="the mistakes are between alike faces")


def no(why: str) -> Decision:
    return Decision(subject=MODEL, approved=False, who="Grace", why=why)


def test_a_release_waits_for_a_yes_and_says_how_to_give_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(GateError) as caught:
        release(run, tmp_path, gates=WAITS)
    assert "waits for a person's yes. To see its figures and decide: mllm-assets approve pets" in str(caught.value)
    assert "Train longer" not in str(caught.value)
    assert not list_releases(Layout(tmp_path), "pets")
    decide(Layout(tmp_path), "pets", YES)
    assert release(run, tmp_path, gates=WAITS).version == "v1"


def test_a_release_that_no_setting_makes_wait_needs_nobody(tmp_path: Path) -> None:
    made = release(make_run(tmp_path / "run"), tmp_path)
    assert APPROVAL not in [gate["name"] for gate in read_manifest(made.directory)["gates"]]
    assert "Decisions of people" not in (made.directory / "README.md").read_text()


def test_the_last_decision_counts_and_all_are_told_in_the_card(tmp_path: Path) -> None:
    run, layout = make_run(tmp_path / "run"), Layout(tmp_path)
    for decision in (YES, no("it | names\nfaces wrongly")):
        decide(layout, "pets", decision)
    with pytest.raises(GateError, match="It was refused by Grace on .*: it . names faces wrongly. To decide again"):
        release(run, tmp_path, gates=WAITS)
    decide(layout, "pets", YES)
    made = release(run, tmp_path, gates=WAITS)
    card = (made.directory / "README.md").read_text()
    assert [line.split(" | ")[1:3] for line in card.splitlines() if "`cccccccccccccccc`" in line and "20" in line] == [
        ["Ada", "approved"], ["Grace", "refused"], ["Ada", "approved"],
    ]  # fmt: skip
    assert "it \\| names faces wrongly |" in card
    assert [decision["approved"] for decision in read_manifest(made.directory)["decisions"]] == [True, False, True]


@pytest.mark.parametrize("other", [{"weights_digest": "d" * 64}, {"predictions_digest": "q" * 64}])
def test_a_yes_to_another_model_or_to_other_answers_is_none(tmp_path: Path, other: dict[str, str]) -> None:
    subject = Subject(**{"weights_digest": "c" * 64, "predictions_digest": "p" * 64, **other})
    decide(Layout(tmp_path), "pets", Decision(subject=subject, approved=True, who="Ada"))
    with pytest.raises(GateError, match="waits for a person"):
        release(make_run(tmp_path / "run"), tmp_path, gates=WAITS)


def test_a_yes_does_not_make_up_for_another_gate(tmp_path: Path) -> None:
    decide(Layout(tmp_path), "pets", YES)
    with pytest.raises(GateError, match="1 of .* gates did not pass.\n  beats_base_model"):
        release(make_run(tmp_path / "run"), tmp_path, gates=GateSpec(approval="required", min_loss_gain_nats=99))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"who": " "}, "give --who NAME"),
        ({"who": "x" * 101}, "who must be at most 100 printable characters, and has 101"),
        ({"who": "A\x1b[31mda"}, "who must be at most 100 printable"),
        ({"approved": False}, "A refusal needs its reason: give --why TEXT"),
        ({"why": "x" * 2001}, "why must be at most 2,000"),
    ],
)
def test_a_decision_without_a_name_or_a_reason_is_refused(values: dict[str, str], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        Decision(**{"subject": MODEL, "approved": True, "who": "Ada", **values})


@pytest.mark.attack("JSON")
@pytest.mark.parametrize(
    "line",
    [
        "{}", "[]", "null", "not json", "\udcff", '{"approved": true}',
        json.dumps({"subject": {}, "approved": True, "who": "A", "when": "", "why": "", "seen": {}}),
        json.dumps({"subject": {"weights_digest": "c", "predictions_digest": "p"}, "approved": "yes", "who": "A",
                    "when": "", "why": "", "seen": {}}),
        json.dumps({"subject": {"weights_digest": "c", "predictions_digest": "p"}, "approved": True, "who": "A",
                    "when": "", "why": "", "seen": {}, "more": 1}),
        json.dumps({"subject": {"weights_digest": 1, "predictions_digest": "p"}, "approved": True, "who": "A",
                    "when": "", "why": "", "seen": {"a": {}}}),
    ],
)  # fmt: skip
def test_a_line_that_is_no_decision_approves_nothing(tmp_path: Path, line: str) -> None:
    layout = Layout(tmp_path)
    decide(layout, "pets", YES)
    path = layout.releases("pets") / APPROVALS
    path.write_bytes(path.read_bytes() + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(IntegrityError, match=r"approvals.jsonl:2 is not a decision"):
        release(make_run(tmp_path / "run"), tmp_path, gates=WAITS)
    with pytest.raises(IntegrityError, match="delete it and decide again"):
        decide(layout, "pets", YES)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    written = [
        YES,
        no("wegen ✗ und 日本語"),
        Decision(subject=MODEL, approved=True, who="Ada", seen={"loss": "1 -> 2"}),
    ]
    for decision in written:
        decide(Layout(tmp_path), "pets", decision)
    assert read_decisions(Layout(tmp_path), "pets") == written
    assert approval_gate("pets", written, MODEL).passed
