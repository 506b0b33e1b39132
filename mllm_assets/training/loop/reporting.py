"""What a run reports: `trainer_log.jsonl`, TensorBoard, trackers, loss plot, progress, and a check of its numbers.

Trackers are what `report_to` names besides TensorBoard, which is always written. Their own settings count, such as
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, WANDB_PROJECT and WANDB_MODE. A resumed run keeps its id. Without
MLFLOW_TRACKING_URI MLflow keeps a recipe's runs in `mlflow.db` next to them, which
`mlflow ui --backend-store-uri sqlite:///outputs/<recipe>/mlflow.db` shows.
"""

import importlib.util
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mllm_assets.artifacts import write_text_atomic
from mllm_assets.errors import MachineError, RecipeError
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.runs.history import (
    TRAINER_LOG,
    answer_curves,
    columns,
    curve,
    folded,
    is_of_preferences,
    measured_curves,
    measured_losses,
    read_log,
    smoothed,
    usual_weight,
)
from mllm_assets.training.runs.run_file import pin_setting, read_run_file

if TYPE_CHECKING:
    from mllm_assets.training.loop.checkpoints import Resumable
    from mllm_assets.worker.protocol import Reporter

MAX_NAMED_SAMPLES = 16
MAX_MARKED = 50  # points of a curve that are marked
TENSORBOARD_DIR = "logs"
LOSS_PLOT = "training_loss.png"
PLOT_SIZE_IN = (8.8, 3.6)  # at 100 dpi: as wide as the window in which Dagster shows it
EVAL_COLORS = ("#d62728", "#2ca02c", "#9467bd", "#8c564b")
SQLITE = "sqlite:///"
RUN_ID_VARIABLES = {
    "mlflow": {"MLFLOW_RUN_ID": "{run_id}"},
    "wandb": {"WANDB_RUN_ID": "{run_id}", "WANDB_RESUME": "allow"},
}


class RunLog(TrainerCallback):
    """Appends LLaMA-Factory's keys to `trainer_log.jsonl`, at full precision, and reports progress.

    After a resume, lines beyond the checkpoint are removed first: those steps are computed again.
    """

    def __init__(
        self, run_dir: Path, reporter: "Reporter", *, num_samples_per_step: int, measured: Sequence[str] = ()
    ) -> None:
        self._answers = [f"eval_{name}" for name in measured]
        self.path = run_dir / TRAINER_LOG
        self.reporter = reporter
        self.num_samples_per_step = num_samples_per_step
        self.facts: dict[str, float] = {}
        self.started_s = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started_s = time.monotonic()
        self.first_step = state.global_step
        if state.is_world_process_zero:
            kept = [line for line in read_log(self.path) if line["current_steps"] <= state.global_step]
            write_text_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.reporter.progress("train", state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        elapsed_s = max(time.monotonic() - self.started_s, 1e-9)
        num_done = state.global_step - self.first_step
        self.facts |= {
            "samples_per_s": num_done * self.num_samples_per_step / elapsed_s,
            "time_left_s": elapsed_s / num_done * (state.max_steps - state.global_step),
        }
        self.reporter.progress("train", state.global_step, state.max_steps, **self.facts)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        keys = ("loss", *measured_losses(logs), *self._answers)
        losses = {key: float(logs[key]) for key in keys if key in logs}
        self.facts |= losses
        if not state.is_world_process_zero or not losses:
            return
        line = self._line(state, logs)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: value for key, value in line.items() if value is not None}) + "\n")

    def _line(self, state: TrainerState, logs: Mapping[str, Any]) -> dict[str, Any]:
        elapsed_s = time.monotonic() - self.started_s
        num_done = max(state.global_step - self.first_step, 1)
        remaining_s = elapsed_s / num_done * (state.max_steps - state.global_step)
        num_tokens = state.num_input_tokens_seen
        return {
            "current_steps": state.global_step,
            "total_steps": state.max_steps,
            "loss": logs.get("loss"),
            **{key: logs[key] for key in (*measured_losses(logs), *self._answers) if key in logs},
            "accuracy": logs.get("rewards/accuracies"),
            **{key: value for key, value in logs.items() if is_of_preferences(key)},
            "lr": logs.get("learning_rate"),
            "epoch": state.epoch,
            "percentage": round(state.global_step / max(state.max_steps, 1) * 100, 2),
            "elapsed_time": str(timedelta(seconds=int(elapsed_s))),
            "remaining_time": str(timedelta(seconds=int(remaining_s))),
            "throughput": round(num_tokens / elapsed_s, 2) if num_tokens and elapsed_s > 0 else None,
            "total_tokens": num_tokens or None,
        }


def tensorboard_callback(run_dir: Path, *, first_step: int) -> TrainerCallback:
    """Return transformers' TensorBoard callback, writing below `logs/`; events of steps to be repeated are purged."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    purge_step = first_step + 1 if first_step else None
    return TensorBoardCallback(SummaryWriter(log_dir=str(run_dir / TENSORBOARD_DIR), purge_step=purge_step))


class SkippedSteps:
    """Counts steps, one after another, that fp16's scaler skips because a gradient overflows; it tries a smaller scale.

    It begins with 2^16 and halves: after more steps than that, gradients overflow without it, and nothing is trained.
    """

    most = 20

    def __init__(self) -> None:
        self._num = 0

    def tolerates(self, grad_norm: float) -> bool:
        """Whether training may go on after a step with this norm, which nobody applies if it is not finite."""
        self._num = 0 if math.isfinite(grad_norm) else self._num + 1
        return self._num < self.most


def check_finite(step: int, batches: Sequence[tuple[Sequence[str], float]], grad_norm: float) -> None:
    """Stop before the optimizer sees a number that is not finite.

    `batches` are sample ids and loss of each micro-batch of the step, `grad_norm` the norm of their gradients together.

    Raises:
        RecipeError: A loss or the gradient norm is not finite. Names the step and the samples of the batches whose loss
            is not finite, or of all where only the norm is not.
    """
    broken = [(ids, loss) for ids, loss in batches if not math.isfinite(loss)]
    if not broken and math.isfinite(grad_norm):
        return
    named = [sample_id for ids, _ in broken or batches for sample_id in ids]
    shown = ", ".join(named[:MAX_NAMED_SAMPLES]) + (
        f" and {len(named) - MAX_NAMED_SAMPLES} more" if len(named) > MAX_NAMED_SAMPLES else ""
    )
    losses = ", ".join(f"{loss:.4g}" for _, loss in broken or batches)
    raise RecipeError(
        f"Step {step} is not finite: loss {losses}, gradient norm {grad_norm:.4g}, with the samples {shown}. The "
        f"weights of step {step - 1} are untouched. Lower learning_rate, raise warmup_ratio, or use bf16 (or float32) "
        f"instead of fp16, which overflows in some models, Gemma 3 among them, and run again."
    )


def plot_loss(run_dir: Path) -> Path | None:
    """Draw `training_loss.png` from the log: training loss, the same smoothed, evaluation losses, metrics of answers.

    A second panel leaves out the first quarter of the steps, whose fall makes the rest look flat. None where there are
    not two points to draw a curve through.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    log = read_log(run_dir / TRAINER_LOG)
    losses, evaluated = curve(log, "loss"), measured_curves(log)
    smooth = smoothed(losses, usual_weight(len(losses)))
    if len(losses) < 2 and all(len(some) < 2 for some in evaluated.values()):
        return None
    first_step = max(step for some in (losses, *evaluated.values()) for step, _ in some) / 4
    panels = {"all steps": 0.0}
    panels |= {"the last three quarters": first_step} if sum(step >= first_step for step, _ in losses) > 2 else {}
    answers = answer_curves(log)
    figure = Figure(figsize=PLOT_SIZE_IN, dpi=100, layout="constrained")
    all_axes = figure.subplots(1, len(panels) + bool(answers), squeeze=False).flat
    for axes, (title, first_step) in zip(all_axes, panels.items(), strict=False):
        axes.plot(*columns(losses, first_step), color="#1f77b4", alpha=0.35, label="loss")
        axes.plot(*columns(smooth, first_step), color="#1f77b4", label="loss, smoothed")
        for (name, points), color in zip(evaluated.items(), cycle(EVAL_COLORS), strict=False):
            axes.plot(*columns(points, first_step), color=color, marker="o", markersize=4, label=name)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set(ylabel="loss (nats a token)")
    for (name, points), color in zip(answers.items(), cycle(EVAL_COLORS), strict=False):
        marker = "o" if len(points) <= MAX_MARKED else ""
        figure.axes[-1].plot(*columns(points), color=color, marker=marker, markersize=4, label=name)
        figure.axes[-1].set_title("answers to a sample", fontsize=10, loc="left")
        figure.axes[-1].legend()
    for axes in figure.axes:
        axes.set(xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    path = run_dir / LOSS_PLOT
    figure.savefig(path, metadata={"Software": None})
    return path


def trainable_lines(table: Sequence[Mapping[str, Any]], num_params: int) -> list[str]:
    """Return the table of what trains: module, tensors, parameters, share of all; equal layers in one line."""
    rows = folded(table)
    trained = sum(row["num_params"] for row in table)
    total = ("all that trains", sum(row["num_tensors"] for row in table), trained)
    width = max(len(name) for name, *_ in [*rows, total])
    return [
        f"{'module':<{width}}  tensors      parameters    share",
        *(
            f"{name:<{width}}  {tensors:>7,}  {params:>14,}  {params / num_params:>7.2%}"
            for name, tensors, params in [*rows, total]
        ),
        f"{'of':<{width}}  {'':>7}  {num_params:>14,}",
    ]


def resume_line(resumable: "Resumable", num_steps: int, device: str) -> str:
    """Say from which checkpoint a run resumes, and how exactly."""
    how = "to the same bits" if device == "cpu" else f"exactly but for the last bits of sums on {device}"
    return (
        f"resuming from {resumable.path} after step {resumable.step} of {num_steps}, {how}: weights, optimizer, "
        f"schedule and random states are restored"
    )


def start_trackers(spec: TrainSpec, run_dir: Path) -> list[str]:
    """Return the trackers for `TrainingArguments.report_to`, set up to continue under the run's ids.

    Raises:
        MachineError: A tracker's package is not installed.
    """
    names = list(spec.trackers)
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MachineError(
                f"The recipe's report_to names {name}, which is not installed. Install it (pip install {name}), or set "
                f"report_to: tensorboard."
            )
    if "mlflow" in names:  # its own default is a file in the working directory
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"{SQLITE}{(run_dir.parent / 'mlflow.db').resolve()}")
    for name, run in tracker_runs(run_dir).items():
        for variable, value in RUN_ID_VARIABLES[name].items():
            os.environ[variable] = value.format(run_id=run["run_id"])
    return names


class TrackerRuns(TrainerCallback):
    """Writes the trackers' run ids and pages into `run.json` as soon as they have started."""

    def __init__(self, run_dir: Path, names: list[str]) -> None:
        self.run_dir = run_dir
        self.names = names

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        pin_setting(self.run_dir, "trackers", {name: _FACTS[name]() for name in self.names})


def tracker_runs(run_dir: Path) -> dict[str, dict[str, str]]:
    """Return `run_id` and `url` (of the run's page, or the folder or database it is in) by tracker."""
    return read_run_file(run_dir).get("trackers", {})


def _mlflow_run() -> dict[str, str]:
    import mlflow

    run = mlflow.active_run()
    assert run is not None, "MLflowCallback has begun a run"
    server, experiment_id, run_id = mlflow.get_tracking_uri(), run.info.experiment_id, run.info.run_id
    if server.startswith(SQLITE):
        return {"run_id": run_id, "url": server.removeprefix(SQLITE)}
    is_server = server.startswith(("http://", "https://"))
    page = f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    return {"run_id": run_id, "url": page if is_server else f"{server}/{experiment_id}/{run_id}"}


def _wandb_run() -> dict[str, str]:
    import wandb

    run = wandb.run
    assert run is not None, "WandbCallback has begun a run"
    return {"run_id": run.id, "url": run.url or run.dir}


_FACTS = {"mlflow": _mlflow_run, "wandb": _wandb_run}
