"""Trials of a recipe with other values, each an ordinary named run, chosen and given up by Optuna.

The study is a database that survives the process: a trial that was interrupted is taken up first, and its run resumes
from its checkpoint. What is chosen next depends on the seed and the trials before it only, so an interruption changes
nothing. What is compared is measured on the evaluation entries, in the order of the steps.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mllm_assets.errors import MachineError, MllmAssetsError, OutOfMemoryError, RecipeError
from mllm_assets.training.runs.history import TRAINER_LOG, read_log
from mllm_assets.training.runs.plan import RunPlan
from mllm_assets.training.runs.sweep_spec import Objective, Range, SweepSpec, shown
from mllm_assets.worker.tasks import Manifest

if TYPE_CHECKING:
    import optuna

OnPoll = Callable[[], None]
Train = Callable[[RunPlan, OnPoll | None], Manifest]
INSTALL = "pip install 'mllm-assets[sweep]'"
NUM_BEFORE_PRUNING = 3  # trials that are trained to the end before a median counts
MAX_WHY_CHARS = 2000
_WHY, _RUN, _WALL_S, _STEP = "why", "run", "wall_s", "step"


class Pruned(Exception):
    """A trial is given up: raised while its run is waited for, which ends that run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What became of one trial.

    Attributes:
        number: From 1, in the order in which they were begun.
        values: Of the parameters.
        run: The name of its run's directory, which `outputs/<recipe>/` holds.
        scores: By objective, of the published step; empty unless it is finished.
        step: The last one that was evaluated.
        why: It was pruned or failed.
    """

    number: int
    values: Mapping[str, Any]
    state: Literal["finished", "pruned", "failed"]
    run: str
    scores: Mapping[str, float]
    step: int
    why: str = ""

    def places(self, objectives: Sequence[Objective]) -> tuple[float, ...]:
        """Its scores so that less is better, the first objective first."""
        return tuple(self.scores[one.key] * (-1 if one.higher_is_better else 1) for one in objectives)


@dataclass(kw_only=True, slots=True)
class _Watched:
    """Reports the evaluations of a trial's run as they are logged, each once and in order."""

    trial: "optuna.Trial"
    log: Path
    spec: SweepSpec
    reported: int = 0  # the last step
    size: int = -1

    def look(self) -> None:
        """Raises `Pruned` at the first step at which the trial is not worth going on with."""
        size = self.log.stat().st_size if self.log.is_file() else 0
        if size == self.size:
            return
        self.size = size
        for line in read_log(self.log):
            first, *others = self.spec.compared_by
            step, value = int(line["current_steps"]), line.get(first.key)
            if value is None or step <= self.reported:
                continue
            self.reported = step
            if others:  # Optuna takes one value of a step
                continue
            self.trial.report(float(value), step)
            if self.spec.prunes and self.trial.should_prune():
                side = "below" if first.higher_is_better else "above"
                why = f"{first.key} {value:.4f} at step {step} is {side} the median of the trials before it"
                raise Pruned(why)


def run_sweep(
    spec: SweepSpec,
    name: str,
    database: Path,
    *,
    plan: Callable[[Mapping[str, Any]], RunPlan],
    train: Train,
    notify: Callable[[str], None],
) -> list[Trial]:
    """Train the trials that a study still lacks, and return all of it.

    Args:
        spec: What is tried.
        name: The study's in the database: of another recipe, data or model it is another one.
        database: An SQLite file.
        plan: Names the run of some values.
        train: Trains a planned run, calling the second argument while it waits, whose `Pruned` it lets pass.
        notify: Told what begins and what came out.

    Raises:
        MachineError: Optuna is not installed.
        RecipeError: Every trial failed. Says why.
    """
    study = _open(spec, name, database)
    grid = spec.grid()
    num_trials = len(grid) or spec.num_trials
    if spec.pruner == "median" and not spec.prunes:
        notify("No trial is given up early: Optuna compares one objective for that, and there are several.")
    _take_up_interrupted(study)
    while (done := len(_ended(study))) < num_trials:
        wall_s = sum(trial.user_attrs.get(_WALL_S, 0.0) for trial in study.trials)
        if spec.max_hours is not None and wall_s > spec.max_hours * 3600:
            notify(f"{done} of {num_trials} trials were made in {wall_s / 3600:.1f} h: max_hours is {spec.max_hours:g}")
            break
        if grid and not _waiting(study):
            study.enqueue_trial(grid[done])
        trial = _ask(study, spec, done)
        notify(f"trial {done + 1} of {num_trials}: {shown(trial.params)}")
        _run_trial(study, trial, plan, train, spec)
        made = trials_of(study, spec)
        best = best_of(made, spec)
        notify(
            f"trial {done + 1} of {num_trials} {made[-1].state}: {shown(made[-1].scores) or made[-1].why}"
            + (f"; the best is trial {best.number} with {shown(best.scores)}" if best else "")
        )
    found = trials_of(study, spec)
    if best_of(found, spec) is None:
        raise RecipeError(f"No trial of the sweep was trained to its end. The last one: {found[-1].why}")
    return found


def best_of(trials: list[Trial], spec: SweepSpec) -> Trial | None:
    """The finished trial that is best by the first objective, by the next ones among equals, then the first."""
    finished = [trial for trial in trials if trial.scores]
    return min(finished, key=lambda trial: trial.places(spec.compared_by), default=None)


def keys_of(spec: SweepSpec) -> list[str]:
    """The names of the objectives in logs and tables."""
    return [objective.key for objective in spec.compared_by]


def unbeaten(trials: list[Trial], spec: SweepSpec) -> list[Trial]:
    """The Pareto-best: finished trials that no other one equals or beats in all objectives, and beats in one."""
    finished = [trial for trial in trials if trial.scores]
    places = [trial.places(spec.compared_by) for trial in finished]

    def is_beaten(own: tuple[float, ...]) -> bool:
        return any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in places)

    return [trial for trial, own in zip(finished, places, strict=True) if not is_beaten(own)]


def trials_of(study: "optuna.Study", spec: SweepSpec) -> list[Trial]:
    """The trials of a study that ended by themselves."""
    keys = keys_of(spec)
    states = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
    return [
        Trial(
            number=number,
            values=trial.params,
            state=states[trial.state.name],  # pyright: ignore[reportArgumentType]
            run=trial.user_attrs.get(_RUN, ""),
            scores=dict(zip(keys, trial.values, strict=True)) if trial.state.name == "COMPLETE" else {},
            step=trial.user_attrs.get(_STEP, max(trial.intermediate_values, default=0)),
            why=trial.user_attrs.get(_WHY, ""),
        )
        for number, trial in enumerate(_ended(study), start=1)
    ]


def _open(spec: SweepSpec, name: str, database: Path) -> "optuna.Study":
    try:
        import optuna
    except ImportError:
        raise MachineError(f"A sweep needs Optuna. Install what it needs with: {INSTALL}") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    database.parent.mkdir(parents=True, exist_ok=True)
    prunes = optuna.pruners.MedianPruner(n_startup_trials=NUM_BEFORE_PRUNING)
    return optuna.create_study(
        study_name=name,
        storage=f"sqlite:///{database}",
        directions=["maximize" if one.higher_is_better else "minimize" for one in spec.compared_by],
        pruner=prunes if spec.prunes else optuna.pruners.NopPruner(),
        load_if_exists=True,
    )


def _ended(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    """Those that were trained, pruned or failed; not those whose process was killed."""
    trials = [trial for trial in study.trials if trial.state.is_finished()]
    return [trial for trial in trials if trial.state.name != "FAIL" or _WHY in trial.user_attrs]


def _waiting(study: "optuna.Study") -> bool:
    return any(trial.state.name == "WAITING" for trial in study.trials)


def _take_up_interrupted(study: "optuna.Study") -> None:
    """Let the trial whose process was killed be the next: its run is found by its values, and resumes."""
    for trial in study.trials:
        if trial.state.name == "RUNNING":
            if trial.params and not _waiting(study):
                study.enqueue_trial(trial.params)
            study.tell(trial.number, state=_state("FAIL"))


def _state(name: str) -> "optuna.trial.TrialState":
    from optuna.trial import TrialState

    return TrialState[name]


def _ask(study: "optuna.Study", spec: SweepSpec, number: int) -> "optuna.Trial":
    """The next trial. Its sampler is new and seeded by its number, so that an interruption changes nothing."""
    import optuna

    study.sampler = optuna.samplers.TPESampler(seed=(spec.seed + number) % 2**31, n_startup_trials=NUM_BEFORE_PRUNING)
    return study.ask(distributions_of(spec))


def distributions_of(spec: SweepSpec) -> dict[str, Any]:
    """What Optuna chooses each parameter from."""
    import optuna

    distributions: dict[str, Any] = {}
    for key, tried in spec.tried().items():
        if not isinstance(tried, Range):
            distributions[key] = optuna.distributions.CategoricalDistribution(tried)
        elif tried.is_whole:
            distributions[key] = optuna.distributions.IntDistribution(
                int(tried.low), int(tried.high), tried.log, int(tried.step or 1)
            )
        else:
            distributions[key] = optuna.distributions.FloatDistribution(tried.low, tried.high, tried.log, tried.step)
    return distributions


def _run_trial(
    study: "optuna.Study",
    trial: "optuna.Trial",
    plan: Callable[[Mapping[str, Any]], RunPlan],
    train: Train,
    spec: SweepSpec,
) -> None:
    began_s, why, values = time.monotonic(), "", None
    try:
        planned = plan(trial.params)
        trial.set_user_attr(_RUN, planned.directory.name)
        watched = _Watched(trial=trial, log=planned.directory / TRAINER_LOG, spec=spec)
        manifest = train(planned, watched.look)
        watched.look()  # what was logged after the last poll
        trial.set_user_attr(_STEP, watched.reported)
        measured = [objective.of(manifest) for objective in spec.compared_by]
        state, values = "COMPLETE", [float(value) for value in measured if value is not None]
        if len(values) < len(measured):
            state, why = "FAIL", "it was not evaluated: eval_steps is above its number of steps."
        elif not all(map(math.isfinite, values)):
            state, why = "FAIL", f"{shown(dict(zip(keys_of(spec), values, strict=True)))} is not finite."
    except Pruned as pruned:
        state, why = "PRUNED", str(pruned)
    except MllmAssetsError as error:
        if isinstance(error, MachineError) and not isinstance(error, OutOfMemoryError):
            raise  # no trial can be trained here: the sweep ends, and goes on once that is mended
        state, why = "FAIL", str(error)[:MAX_WHY_CHARS]
    trial.set_user_attr(_WALL_S, time.monotonic() - began_s)
    if why:
        trial.set_user_attr(_WHY, why)
    study.tell(trial, values if state == "COMPLETE" else None, state=_state(state))
