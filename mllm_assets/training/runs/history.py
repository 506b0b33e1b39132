"""The runs of a project: what each was asked, how far it is, and the losses that it has logged so far."""

import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mllm_assets.artifacts import is_complete, is_locked, lock_path, read_manifest
from mllm_assets.errors import MllmAssetsError
from mllm_assets.layout import Layout
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.runs.plan import shown_overrides
from mllm_assets.training.runs.run_file import RUN_FILE, read_run_file

TRAINER_LOG = "trainer_log.jsonl"  # LLaMA-Factory's name and keys
MAX_LOG_BYTES = 64 * 2**20  # some 300,000 lines
MAX_POINTS = 1000  # of a curve on a page
QUIET_S = 120  # an unfinished run that logged nothing for longer is not training
# of a recipe's values those that say where things are, not what is computed
_PLACES = ("output_dir", "logging_dir", "report_to", "run_name")
# what a run trained with whose recipe was written down before a key was there
REWARD = "reward"  # the mean of a step's answers
_OF_STAGES = ("kl", "eval_kl", REWARD, "reward_std", "frac_reward_zero_std")
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(TrainSpec) if f.default is not dataclasses.MISSING}


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownRun:
    """One run below `outputs/`.

    Attributes:
        directory: `outputs/<recipe>/<fingerprint>`.
        overrides: Its values instead of those of the recipe's file; empty too where that is not known yet.
        recipe: All values that it trains with.
        state: "training" where it has logged something in the last two minutes.
        changed_s: When it last wrote something, in Unix time.
    """

    directory: Path
    overrides: Mapping[str, Any]
    recipe: Mapping[str, Any]
    state: Literal["finished", "training", "stopped"]
    changed_s: float

    @property
    def key(self) -> str:
        """`<recipe>/<fingerprint>`, which every command takes."""
        return f"{self.directory.parent.name}/{self.directory.name}"

    @property
    def name(self) -> str:
        """What a person calls it: the recipe, and what differs from its file."""
        return f"{self.directory.parent.name} {shown_overrides(self.overrides)}".rstrip()

    @property
    def log(self) -> list[dict[str, Any]]:
        """What it has logged so far."""
        return read_log(self.directory / TRAINER_LOG)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a `trainer_log.jsonl`; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = []
    with path.open(encoding="utf-8") as file:
        text = file.read(MAX_LOG_BYTES)
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def known_runs(layout: Layout) -> list[KnownRun]:
    """Every run of the project, the one that wrote last first; folders that cannot be read are left out."""
    paths = [path for path in layout.outputs.glob(f"*/*/{RUN_FILE}") if not path.parent.is_symlink()]
    runs = [run for path in paths if (run := _read(path.parent)) is not None]
    return sorted(runs, key=lambda run: (run.state != "training", -run.changed_s))


def _read(directory: Path) -> KnownRun | None:
    try:
        kept = read_run_file(directory)
        finished = is_complete(directory)
        manifest = read_manifest(directory) if finished else {}
        recipe = manifest.get("recipe") or kept.get("starts_from", {}).get("recipe", {})
        overrides = manifest.get("overrides") or kept.get("overrides") or {}
        changed_s = max(path.stat().st_mtime for path in (directory, directory / RUN_FILE, *_log_of(directory)))
    except (OSError, ValueError, AttributeError, MllmAssetsError):
        return None
    if not isinstance(recipe, dict) or not isinstance(overrides, dict):
        return None
    # a clock that was set makes its log old, or of the future: the lock is what a training holds
    active = 0 <= time.time() - changed_s < QUIET_S or is_locked(lock_path(directory))
    state = "finished" if finished else "training" if active else "stopped"
    recipe = {**_DEFAULTS, **recipe} if recipe else recipe
    return KnownRun(directory=directory, overrides=overrides, recipe=recipe, state=state, changed_s=changed_s)


def _log_of(directory: Path) -> Iterator[Path]:
    if (path := directory / TRAINER_LOG).is_file():
        yield path


def curve(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """A log's values by step, at most `MAX_POINTS`, evenly spaced."""
    points = [(int(line["current_steps"]), float(line[key])) for line in log if line.get(key) is not None]
    if len(points) <= MAX_POINTS:
        return points
    return [points[index * (len(points) - 1) // (MAX_POINTS - 1)] for index in range(MAX_POINTS)]


def measured_losses(line: Mapping[str, Any]) -> list[str]:
    """The evaluation's losses in a line of a log: `eval_loss`, or one for each entry (`eval_on_each_dataset`)."""
    return [key for key in line if key.startswith("eval_") and key.endswith("loss")]


def measured_answers(line: Mapping[str, Any]) -> list[str]:
    """The metrics of answers in a line of a `trainer_log.jsonl`, such as `eval_label_accuracy`."""
    of_evaluation = (key for key in line if key.startswith("eval_") and not key.endswith("loss"))
    return [key for key in of_evaluation if not is_of_preferences(key)]


def is_of_preferences(key: str) -> bool:
    """Whether a key of a log is what `stage: dpo`, `kto` or `grpo` measures beside the loss."""
    return any(part in key for part in ("rewards/", "logps/", "completions/")) or key in _OF_STAGES


def answer_curves(log: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The curve of each metric of answers, by its key, and that of the reward of `stage: grpo`."""
    keys = dict.fromkeys(key for line in log for key in (*measured_answers(line), REWARD) if key in line)
    return {key: curve(log, key) for key in keys}


def measured_curves(log: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The curve of each of the evaluation's losses, by its key."""
    return {key: curve(log, key) for key in dict.fromkeys(key for line in log for key in measured_losses(line))}


def smoothed(points: Sequence[tuple[int, float]], weight: float) -> list[tuple[int, float]]:
    """A local parabola (LOESS) through each point's neighbours, which count less with each place by `weight` squared.

    It averages about as many points as a running mean with that weight, but from both sides, and so neither trails a
    fall nor is pulled at the ends. Points that are not finite are left out.
    """
    points = [(step, value) for step, value in points if math.isfinite(value)]
    if len(points) < 3 or weight <= 0:
        return points
    count, values = len(points), np.array([value for _, value in points])
    distances = np.arange(1 - count, count)
    kernels = [weight ** (2 * abs(distances)) * (-distances) ** power for power in range(5)]
    sums = [np.convolve(np.ones(count), kernel)[count - 1 : 2 * count - 1] for kernel in kernels]
    products = [np.convolve(values, kernel)[count - 1 : 2 * count - 1] for kernel in kernels[:3]]
    normal = np.array([[sums[row + column] for column in range(3)] for row in range(3)])
    fitted = np.linalg.solve(normal.transpose(2, 0, 1), np.array(products).T[..., None])
    return [(step, float(value)) for (step, _), value in zip(points, fitted[:, 0, 0], strict=True)]


def columns(points: Sequence[tuple[int, float]], first_step: float = 0) -> tuple[list[int], list[float]]:
    """The steps and the values of a curve, from a step on."""
    shown = [point for point in points if point[0] >= first_step]
    return [step for step, _ in shown], [value for _, value in shown]


def usual_weight(num_points: int) -> float:
    """LLaMA-Factory's weight for the smoothed loss, which grows with the number of points, up to 0.9."""
    return 1.8 * (1 / (1 + math.exp(-0.05 * num_points)) - 0.5)


def differing_keys(runs: Sequence[KnownRun]) -> list[str]:
    """The recipe keys in which runs differ, apart from where they write."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    values = {key: {json.dumps(run.recipe.get(key), sort_keys=True) for run in runs} for key in keys}
    return [key for key, found in values.items() if len(found) > 1 and key not in _PLACES]


def folded(trainable: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """Module, tensors and parameters of what trains; equal layers that follow each other are one line."""
    found: list[tuple[str, int, int]] = []
    for _, group in itertools.groupby(enumerate(trainable), key=_kind):
        rows = [row for _, row in group]
        first, last = rows[0]["module"], rows[-1]["module"].rpartition(".")[2]
        name = first if len(rows) == 1 else f"{first} to {last}"
        found.append((name, sum(row["num_tensors"] for row in rows), sum(row["num_params"] for row in rows)))
    return found


def _kind(numbered: tuple[int, Mapping[str, Any]]) -> tuple[Any, ...]:
    """The same for equal layers that follow each other: their number rises with their position."""
    place, row = numbered
    layer = re.fullmatch(r"(.*\.layers)\.(\d+)", row["module"])
    return (layer[1], int(layer[2]) - place, row["num_tensors"], row["num_params"]) if layer else (row["module"],)
