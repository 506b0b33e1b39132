"""Training rows are ranked by how suspicious their answers are, and groups of near-duplicates are never split up."""

from pathlib import Path

import pytest

from mllm_assets.artifacts import is_sound
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.errors import RecipeError
from mllm_assets.evaluation.label_issues import (
    IssueRows,
    LabelIssuesSpec,
    caption_issues,
    label_issues,
    publish_issues,
    read_issues,
)
from mllm_assets.training.runs.fold_plan import assign_folds


def rows(answers: dict[str, str], labels: tuple[str, ...] = ()) -> IssueRows:
    return IssueRows(answers=answers, groups={row_id: row_id for row_id in answers}, copies={}, labels=labels)


def test_near_duplicates_are_in_one_fold_and_labels_are_spread_over_all() -> None:
    """A copy of a row that was trained on says what the row says, wrong or not."""
    groups = [f"group {number // 3}" for number in range(60)]
    labels = ["cat" if number // 3 % 2 else "dog" for number in range(60)]
    folds = assign_folds(groups, labels, num_folds=5)
    assert all(len({fold for fold, group in zip(folds, groups, strict=True) if group == one}) == 1 for one in groups)
    for fold in range(5):
        own = [label for label, at in zip(labels, folds, strict=True) if at == fold]
        assert own.count("cat") == own.count("dog") == 6
    assert folds == assign_folds(groups, labels, num_folds=5)
    assert folds != assign_folds(groups, labels, num_folds=5, seed=1)


def test_a_caption_is_suspicious_by_the_loss_of_those_that_look_alike_not_by_its_own() -> None:
    """Long or rare captions have high losses, and so have those beside them."""
    answers = {f"hard {n}": "a rare text" for n in range(10)} | {f"easy {n}": "a text" for n in range(10)}
    losses = {row_id: (4.0 if "hard" in row_id else 1.0) + 0.01 * int(row_id[-1]) for row_id in answers}
    losses["easy 3"] = 3.5
    alike = {one: [other for other in answers if other != one and other[:4] == one[:4]] for one in answers}
    issues = caption_issues(rows(answers), losses, alike)
    assert issues[0].sample_id == "easy 3" and issues[0].is_suspect
    assert "loss 3.50 nats a token, of those that look most alike 1.0" in issues[0].reason
    assert sum(issue.is_suspect for issue in issues) == 1


def test_a_label_that_other_classifiers_contradict_is_first_with_what_they_say() -> None:
    pytest.importorskip("cleanlab")
    answers = {f"row {n}": "cat" if n < 10 else "dog" for n in range(20)}
    said = {row_id: (0.9, 0.1) if answer == "cat" else (0.1, 0.9) for row_id, answer in answers.items()}
    said["row 4"] = (0.02, 0.98)
    first, *others = label_issues(rows(answers, ("cat", "dog")), said)
    assert (first.sample_id, first.given, first.suggested, first.is_suspect) == ("row 4", "cat", "dog", True)
    assert first.reason == "'dog' is likelier by its picture (0.98 against 0.02)"
    assert not any(issue.is_suspect for issue in others)


def test_the_newest_ranking_is_the_one_that_reviewing_begins_with(tmp_path: Path) -> None:
    answers = {f"{n:016x}": "a text" for n in range(3)}
    store, alike = QualityStore(tmp_path / "quality.duckdb"), {one: [o for o in answers if o != one] for one in answers}
    for number, worst in enumerate(answers):
        losses = {row_id: 3.0 if row_id == worst else 1.0 for row_id in answers}
        issues = caption_issues(rows(answers), losses, alike)
        directory = tmp_path / f"{number:016x}"
        publish_issues(directory, issues, dataset="made", recipe="mine", store=store, run_id=f"run {number}")
        assert is_sound(directory) and read_issues(directory) == issues
        [first] = store.query("SELECT sample_id FROM latest_label_issues WHERE position = 1")
        assert first["sample_id"] == worst
    assert len(store.query("FROM label_issues")) == 9


@pytest.mark.parametrize("values", [{"num_folds": 1}, {"max_steps": 0}])
def test_a_setting_that_finds_nothing_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(values))} is"):
        LabelIssuesSpec(recipe="mine", **values)
