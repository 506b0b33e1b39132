"""The loop of a sweep: real studies in SQLite, over a function of the values in place of a training."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mllm_assets.artifacts import read_manifest
from mllm_assets.errors import MachineError, OutOfMemoryError, RecipeError
from mllm_assets.layout import Layout
from mllm_assets.recipe.load import load_recipe
from mllm_assets.training.runs.sweep import OnPoll, Trial, best_of, run_sweep, unbeaten
from mllm_assets.training.runs.sweep_result import PICTURES, publish_sweep, read_trials
from mllm_assets.training.runs.sweep_spec import SweepSpec

pytest.importorskip("optuna")
pytestmark = pytest.mark.not_fast
SPEC = SweepSpec(parameters={"x": {"low": 0.0, "high": 1.0}, "kind": ["a", "b"]}, num_trials=8, pruner="none")


@dataclass(frozen=True)
class Plan:
    directory: Path
    values: Mapping[str, Any]


class World:
    """Runs whose loss is the distance of x from 0.3, logged at three steps."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.trained, self.said = folder, list[float](), list[str]()
        self.ends_at = 10**9  # trials, as a kill would
        self.fails: Mapping[str, Exception] = {}

    def plan(self, values: Mapping[str, Any]) -> Any:
        return Plan(self.folder / f"run-{values['x']:.12f}-{values['kind']}", values)

    def train(self, plan: Any, on_poll: OnPoll | None) -> dict[str, Any]:
        if len(self.trained) == self.ends_at:
            raise KeyboardInterrupt
        self.trained.append(plan.values["x"])
        if error := self.fails.get(plan.values["kind"]):
            raise error
        loss = abs(plan.values["x"] - 0.3)
        plan.directory.mkdir()
        with (plan.directory / "trainer_log.jsonl").open("w") as log:
            for step in (1, 2, 3):
                line = {"current_steps": step, "eval_loss": loss + 3 - step, "eval_anls": (1 - loss) * step / 3}
                log.write(json.dumps(line) + "\n")
                log.flush()
                if on_poll:
                    on_poll()
        return {"eval_loss": loss, "eval_answers": {"anls": 1 - loss, "rouge_l": plan.values["x"]}}

    def sweep(self, spec: SweepSpec = SPEC) -> list[Trial]:
        return run_sweep(
            spec, "a", self.folder / "s.sqlite3", plan=self.plan, train=self.train, notify=self.said.append
        )  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_the_best_is_the_lowest_loss_and_a_finished_sweep_trains_nothing(world: World) -> None:
    trials = world.sweep()
    assert [trial.number for trial in trials] == list(range(1, 9)) and len(world.trained) == 8
    best = best_of(trials, SPEC)
    assert best is not None and best.scores["eval_loss"] == min(abs(x - 0.3) for x in world.trained)
    assert world.said[0].startswith("trial 1 of 8: x ") and "; the best is trial" in world.said[-1]
    assert world.sweep() == trials and len(world.trained) == 8


@pytest.mark.parametrize("kills", [[3], [0, 1, 5]])
def test_interrupted_anywhere_it_comes_to_the_same(world: World, tmp_path: Path, kills: list[int]) -> None:
    (tmp_path / "whole").mkdir()
    whole = World(tmp_path / "whole").sweep()
    for world.ends_at in kills:
        with pytest.raises(KeyboardInterrupt):
            world.sweep()
    world.ends_at = 10**9
    assert world.sweep() == whole
    assert len(world.trained) == 8, "a trial that ended is not trained again"


def test_more_trials_go_on_with_the_same_sweep(world: World) -> None:
    first = world.sweep()
    more = world.sweep(SweepSpec(parameters=SPEC.parameters, num_trials=10, pruner="none"))
    assert more[:8] == first and len(world.trained) == 10


def test_what_is_above_the_median_is_given_up_with_its_reason(world: World) -> None:
    trials = world.sweep(SweepSpec(parameters=SPEC.parameters, num_trials=8, seed=5))
    pruned = [trial for trial in trials if trial.state == "pruned"]
    assert pruned and all(trial.number > 3 and not trial.scores for trial in pruned)
    assert "at step 1 is above the median of the trials before it" in pruned[0].why


def test_a_trial_that_cannot_be_trained_is_told_and_the_others_go_on(world: World) -> None:
    world.fails = {"b": OutOfMemoryError("The run needs about 99 GiB")}
    trials = world.sweep()
    assert {(trial.state, trial.why) for trial in trials if trial.values["kind"] == "b"} == {
        ("failed", "The run needs about 99 GiB")
    }
    assert any(trial.state == "finished" for trial in trials) and len(world.trained) == 8


def test_a_machine_that_trains_nothing_ends_the_sweep_which_then_goes_on(world: World) -> None:
    world.fails = {kind: MachineError("The disk is full") for kind in "ab"}
    with pytest.raises(MachineError, match="The disk is full"):
        world.sweep()
    assert len(world.trained) == 1
    world.fails = {}
    assert len(world.sweep()) == 8 and len(world.trained) == 9


def test_a_sweep_without_a_finished_trial_is_an_error_with_the_last_reason(world: World) -> None:
    world.fails = {kind: RecipeError("the loss is not finite") for kind in "ab"}
    with pytest.raises(RecipeError, match="No trial .* The last one: the loss is not finite"):
        world.sweep()


def test_a_grid_is_tried_once_each(world: World) -> None:
    spec = SweepSpec(parameters={"x": [0.1, 0.2, 0.4], "kind": ["a", "b"]}, num_trials=9, pruner="none")
    world.ends_at = 2
    with pytest.raises(KeyboardInterrupt):
        world.sweep(spec)
    world.ends_at = 10**9
    trials = world.sweep(spec)
    assert sorted((trial.values["x"], trial.values["kind"]) for trial in trials) == [
        (x, kind) for x in (0.1, 0.2, 0.4) for kind in "ab"
    ]
    best = best_of(trials, SPEC)
    assert best is not None and best.values["x"] in (0.2, 0.4)


def test_no_trial_starts_after_the_hours(world: World) -> None:
    trials = world.sweep(SweepSpec(parameters=SPEC.parameters, num_trials=8, max_hours=1e-9))
    assert len(trials) == 1 and "max_hours is 1e-09" in world.said[-1]


def test_the_best_by_a_metric_of_answers_is_the_highest_and_what_is_below_the_median_is_given_up(world: World) -> None:
    spec = SweepSpec(parameters=SPEC.parameters, num_trials=8, seed=5, objective="anls")
    trials = world.sweep(spec)
    best = best_of(trials, spec)
    assert best is not None and best.scores == {"eval_anls": 1 - min(abs(x - 0.3) for x in world.trained)}
    pruned = [trial for trial in trials if trial.state == "pruned"]
    assert pruned and "at step 1 is below the median of the trials before it" in pruned[0].why


def test_of_several_objectives_the_first_decides_and_no_trial_is_given_up(world: World) -> None:
    spec = SweepSpec(parameters=SPEC.parameters, num_trials=8, objectives=("anls", "eval_rouge_l"))
    trials = world.sweep(spec)
    assert all(trial.state == "finished" and trial.step == 3 for trial in trials)
    assert world.said[0] == "No trial is given up early: Optuna compares one objective for that, and there are several."
    best, front = best_of(trials, spec), unbeaten(trials, spec)
    assert best is not None and best in front
    assert best.scores["eval_anls"] == max(trial.scores["eval_anls"] for trial in trials)
    pairs = [(trial.scores["eval_anls"], trial.scores["eval_rouge_l"]) for trial in trials]
    for trial, own in zip(trials, pairs, strict=True):
        beaten = any(other[0] >= own[0] and other[1] >= own[1] and other != own for other in pairs)
        assert (trial in front) is not beaten
    assert world.sweep(spec) == trials and len(world.trained) == 8


def test_the_result_of_several_objectives_shows_them_all(world: World, tmp_path: Path) -> None:
    spec = SweepSpec(parameters=SPEC.parameters, num_trials=5, objectives=("loss", "anls"))
    (tmp_path / "r.yaml").write_text(
        "model_name_or_path: m\ndataset: a\ntemplate: gemma3\ndo_train: true\neval_dataset: v\neval_strategy: steps\n"
    )
    recipe, trials = load_recipe(tmp_path / "r.yaml"), world.sweep(spec)
    directory = publish_sweep(Layout(tmp_path), recipe, spec, trials)
    best = best_of(trials, spec)
    assert best is not None and read_manifest(directory)["scores"] == dict(best.scores)
    read = read_trials(directory)
    assert [trial["number"] for trial in read if trial["place"] == 1] == [best.number]
    assert {trial["number"] for trial in read if trial["is_unbeaten"]} == {one.number for one in unbeaten(trials, spec)}
    assert all((directory / f"{name}.png").is_file() for name in PICTURES)
    assert "by eval_loss before eval_anls on v: eval_loss 0." in (directory / "r_swept.yaml").read_text()


def test_a_trial_whose_objective_was_not_measured_is_told(world: World) -> None:
    with pytest.raises(RecipeError, match="No trial .* The last one: it was not evaluated"):
        world.sweep(SweepSpec(parameters=SPEC.parameters, num_trials=2, objective="exact_match"))
