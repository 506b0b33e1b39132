"""What a sweep tries: recipe keys with values or ranges, how many trials, and when one is given up."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mllm_assets.errors import RecipeError, all_of
from mllm_assets.recipe.answer_metrics import UNTRIED, answer_metrics
from mllm_assets.recipe.load import Recipe, load_recipe
from mllm_assets.recipe.spec import TrainSpec

MAX_TRIALS = 10_000
LOSS = "eval_loss"
# what the asset depends on: one model is loaded, and one set of entries looked at for leaks
_INPUTS = {"model_name_or_path", "adapter_name_or_path", "dataset", "media_dir"}
# with another value of these the loss on val is of other tokens, or of another task
_JUDGE = {
    "eval_dataset", "dataset_dir", "template", "cutoff_len", "train_on_prompt", "mask_history",
    "label_smoothing_factor",
    "resume_from_checkpoint",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones where both are."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What trials are compared by, on `eval_dataset`: `eval_loss`, or a metric of answers."""

    key: str  # as in `trainer_log.jsonl`
    higher_is_better: bool

    @property
    def metric(self) -> str | None:
        """The metric of answers; None of the loss."""
        return None if self.key == LOSS else self.key.removeprefix("eval_")

    def of(self, manifest: Mapping[str, Any]) -> float | None:
        """Its value of a finished run's published step; None where that was not measured."""
        return manifest.get(LOSS) if self.metric is None else manifest.get("eval_answers", {}).get(self.metric)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSpec:
    """A sweep over keys of a recipe. What is chosen is the lowest loss on `eval_dataset`, or the best of `objective`.

    Attributes:
        parameters: Recipe key -> a list of values, or `{low, high, log, step}`.
        objective: By what trials are compared on `eval_dataset`: `eval_loss`, or a metric of answers to some of its
            rows, such as `label_accuracy`.
        objectives: Several of them instead, for which Optuna looks for trials that no other one beats in all. Of those
            the first objective decides, the next ones where it is equal. No trial is given up early.
        num_trials: How many trials are trained. Lists alone whose combinations are not more make a grid.
        max_hours: No further trial starts after so many hours of training; null: never.
        pruner: `median` gives up a trial whose figure on `eval_dataset` is worse than the median of those before it at
            the same step; `none` trains all to the end.
        seed: Of the choice of values. The same seed, data and recipe choose the same.
    """

    parameters: dict[str, Any]
    num_trials: int = 12
    max_hours: float | None = None
    pruner: Literal["median", "none"] = "median"
    seed: int = 0
    objective: str = LOSS
    objectives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._require_objectives()
        if not self.parameters:
            raise RecipeError("sweep: parameters is empty. Name a key of the recipe: learning_rate: [1e-4, 1e-3].")
        if not 1 <= self.num_trials <= MAX_TRIALS:
            raise RecipeError(f"sweep: num_trials is {self.num_trials}: expected 1 to {MAX_TRIALS:,}.")
        if self.max_hours is not None and not self.max_hours > 0:
            raise RecipeError(f"sweep: max_hours is {self.max_hours}: expected more than 0, or null.")
        if not 0 <= self.seed < 2**31:
            raise RecipeError(f"sweep: seed is {self.seed}: expected 0 to {2**31 - 1:,}.")
        self.tried()

    def _require_objectives(self) -> None:
        names, known = [_log_key(name) for name in self.objectives or [self.objective]], ["loss", *answer_metrics()]
        if self.objectives and self.objective != LOSS:
            raise RecipeError("sweep: objective and objectives are both set. Name all in objectives.")
        if len(set(names)) < len(names):
            raise RecipeError(f"sweep: objectives names one twice: {', '.join(self.objectives)}. Leave it out.")
        for name in names:
            if name.removeprefix("eval_") not in known:
                text = f"sweep: objective {name.removeprefix('eval_')!r}: expected one of eval_loss, "
                raise RecipeError(f"{text}{', '.join(answer_metrics())}. Correct it.")

    @property
    def compared_by(self) -> tuple[Objective, ...]:
        """What decides, the first one first."""
        keys = [_log_key(name) for name in self.objectives or [self.objective]]
        return tuple(
            Objective(key=key, higher_is_better=key != LOSS and answer_metrics()[key.removeprefix("eval_")])
            for key in keys
        )

    @property
    def asked(self) -> tuple[str, ...]:
        """The metrics of answers among them."""
        return tuple(objective.metric for objective in self.compared_by if objective.metric)

    @property
    def prunes(self) -> bool:
        """Whether trials are given up early; Optuna compares one value for that."""
        return self.pruner == "median" and len(self.compared_by) == 1

    def tried(self) -> dict[str, list[Any] | Range]:
        """The values or the range of each key.

        Raises:
            RecipeError: One is neither. Names all that are wrong.
        """
        found: dict[str, list[Any] | Range] = {}
        problems = []
        for key, value in self.parameters.items():
            try:
                found[key] = _tried(value)
            except ValueError as error:
                problems.append(f"sweep: parameters.{key}: {error}")
        if problems:
            raise RecipeError(all_of(problems))
        return found

    def grid(self) -> list[dict[str, Any]]:
        """All combinations where there are only lists, and no more of them than trials; else nothing."""
        tried = self.tried()
        lists = [values for values in tried.values() if isinstance(values, list)]
        if len(lists) < len(tried) or math.prod(map(len, lists)) > self.num_trials:
            return []
        return [dict(zip(tried, values, strict=True)) for values in itertools.product(*lists)]


def _log_key(name: str) -> str:
    return f"eval_{name.removeprefix('eval_')}"


def _tried(value: Any) -> list[Any] | Range:
    if isinstance(value, list):
        if not value or len({repr(one) for one in value}) < len(value):
            raise ValueError("expected a list of different values.")
        if any(isinstance(one, list | dict) for one in value):
            raise ValueError("a value in the list is a list itself; expected texts, numbers or booleans.")
        return [_number(one) for one in value]
    if not isinstance(value, dict) or not {"low", "high"} <= value.keys() <= {
        f.name for f in dataclasses.fields(Range)
    }:
        raise ValueError(f"{value!r} is neither a list of values nor {{low, high, log, step}}.")
    numbers = {name: _number(value[name]) for name in ("low", "high", "step") if value.get(name) is not None}
    if wrong := [name for name, one in numbers.items() if isinstance(one, str | bool) or not math.isfinite(one)]:
        raise ValueError(f"{wrong[0]} is {value[wrong[0]]!r}, not a number.")
    found = Range(**numbers, log=value.get("log") is True)
    if value.get("log") not in (None, True, False):
        raise ValueError(f"log is {value['log']!r}: expected true or false.")
    if not found.low < found.high:
        raise ValueError(f"low {found.low} is not below high {found.high}.")
    if found.log and (found.low <= 0 or found.step is not None):
        raise ValueError("log: true needs a low above 0, and takes no step.")
    if found.step is not None and not 0 < found.step <= found.high - found.low:
        raise ValueError(f"step is {found.step}: expected more than 0, and no more than high - low.")
    if found.is_whole and found.step is not None and not isinstance(found.step, int):
        raise ValueError(f"step is {found.step}: expected a whole number, as low and high are.")
    return found


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as a text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def check_against(spec: SweepSpec, recipe: Recipe) -> None:
    """Refuse what no trial could be trained or compared with, before the first is.

    Raises:
        RecipeError: A key is unknown or does not decide about the weights, a value is invalid, or nothing is evaluated
            while training. Names all.
    """
    problems = list(_problems(spec, recipe))
    if problems:
        raise RecipeError(all_of(problems))


def _problems(spec: SweepSpec, recipe: Recipe) -> Iterator[str]:
    if recipe.spec.eval_strategy == "no" or not recipe.spec.eval_entries:
        yield f"{recipe.path}: a sweep compares losses on eval_dataset. Set eval_dataset and eval_strategy: steps."
    for metric in spec.asked:
        for key in UNTRIED:
            if getattr(recipe.spec, key):
                yield f"{recipe.path}: {key} together with the objective {metric} has not been tried. Delete one."
    if recipe.spec.evaluates_each:
        yield f"{recipe.path}: a sweep compares one loss of each trial. Delete eval_on_each_dataset."
    scopes = {item.name: item.metadata["scope"] for item in dataclasses.fields(TrainSpec)}
    for key, values in spec.tried().items():
        if key in _JUDGE:
            yield f"sweep: parameters.{key}: with another {key} the losses are not of the same. Leave it out."
        elif key in _INPUTS:
            yield f"sweep: parameters.{key}: all trials start from one model and one dataset. Write a recipe for each."
        elif scopes.get(key, "semantic") not in ("semantic", "selection"):
            yield f"sweep: parameters.{key}: it decides nothing about the weights. Leave it out."
        else:
            yield from _refusals(recipe.path, key, values)


def _refusals(path: Path, key: str, values: Sequence[Any] | Range) -> Iterator[str]:
    for value in [values.low, values.high] if isinstance(values, Range) else values:
        try:
            load_recipe(path, {key: value})
        except RecipeError as error:
            yield f"sweep: parameters.{key}: {error}"
            return


def shown(values: Mapping[str, Any]) -> str:
    """Values as a line of a log or a table."""
    texts = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in values.items()}
    return ", ".join(f"{key} {text}" for key, text in texts.items())
