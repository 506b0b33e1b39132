"""What a run says of itself: `trainer_log.jsonl`, TensorBoard, loss plot, progress, and a guard of its numbers."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mllm_assets.artifacts import write_text_atomic
from mllm_assets.errors import RecipeError

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter

MAX_NAMED_SAMPLES = 16
TRAINER_LOG = "trainer_log.jsonl"
TENSORBOARD_DIR = "logs"
LOSS_PLOT = "training_loss.png"


class RunLog(TrainerCallback):
    """Appends LLaMA-Factory's keys to `trainer_log.jsonl`, at full precision, and reports progress.

    After a resume, lines beyond the checkpoint are taken out first: those steps are computed again.
    """

    def __init__(self, run_dir: Path, reporter: "Reporter", *, num_samples_per_step: int) -> None:
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
        self.facts |= {key: float(logs[key]) for key in ("loss", "eval_loss") if key in logs}
        if not state.is_world_process_zero or not ({"loss", "eval_loss"} & logs.keys()):
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
            "eval_loss": logs.get("eval_loss"),
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


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a `trainer_log.jsonl`; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def check_finite(step: int, batches: Sequence[tuple[Sequence[str], float]], grad_norm: float) -> None:
    """Stop before the optimizer sees a number that is none.

    Args:
        step: The step about to be done.
        batches: Sample ids and loss of each of its micro-batches.
        grad_norm: The norm of their gradients together.

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
        f"weights of step {step - 1} are untouched. Lower learning_rate, raise warmup_ratio, or use bf16 in place of "
        f"fp16, and run again."
    )


def plot_loss(run_dir: Path) -> Path:
    """Draw `training_loss.png` from the log: training loss, its running mean, and evaluation loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_log(run_dir / TRAINER_LOG)
    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = _series(lines, "loss")
    axes.plot(steps, losses, color="#1f77b4", alpha=0.35, label="loss")
    axes.plot(steps, smooth(losses), color="#1f77b4", label="loss, smoothed")
    eval_steps, eval_losses = _series(lines, "eval_loss")
    if eval_steps:
        axes.plot(eval_steps, eval_losses, color="#d62728", marker="o", markersize=3, label="eval_loss")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path = run_dir / LOSS_PLOT
    figure.savefig(path, metadata={"Software": None})
    return path


def smooth(values: list[float]) -> list[float]:
    """Return the running mean that TensorBoard and LLaMA-Factory draw; its weight grows with the number of values."""
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    smoothed: list[float] = []
    for value in values:
        last = smoothed[-1] if smoothed else value
        smoothed.append(last * weight + (1 - weight) * value)
    return smoothed


def _series(lines: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [line for line in lines if key in line]
    return [line["current_steps"] for line in found], [line[key] for line in found]
