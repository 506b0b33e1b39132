"""The board's picture of curves: losses as drawn, metrics of answers as text."""

import json
from pathlib import Path
from typing import Any

from mllm_assets.cli.board.views import curves_view
from mllm_assets.training.runs.history import TRAINER_LOG, KnownRun


def run_with(folder: Path, lines: list[dict[str, Any]]) -> KnownRun:
    (folder / TRAINER_LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return KnownRun(directory=folder, overrides={}, recipe={}, state="finished", changed_s=0.0)


def test_answers_that_were_measured_while_training_are_below_the_curves(tmp_path: Path) -> None:
    lines = [{"current_steps": step, "eval_loss": 2.0 / step, "eval_label_accuracy": step / 8} for step in (2, 4, 6, 8)]
    page = curves_view([run_with(tmp_path, lines)], ["mine"], smooth=0.0, logarithmic=False)
    assert (
        "mine, answers to a sample: eval_label_accuracy: 0.5000 at step 4, 0.7500 at step 6, 1.0000 at step 8" in page
    )
    assert "step 8: eval loss 0.2500" in page
    without = [{key: value for key, value in line.items() if key != "eval_label_accuracy"} for line in lines]
    assert "answers to a sample" not in curves_view([run_with(tmp_path, without)], ["m"], smooth=0.0, logarithmic=True)
