"""Compares a released model, loaded by a new process without this project, with the checkpoint it was made from."""

import json
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_assets.errors import IntegrityError
from mllm_assets.releases import reload_check
from mllm_assets.releases.files import ADAPTER
from mllm_assets.training.models.load import load_model, quiet_libraries
from mllm_assets.training.models.older_transformers import oldest_reader
from mllm_assets.worker.tasks import Verification, VerifyTask

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

_REL_TOL = 1e-6  # the same device and libraries; only the loader differs
_ADAPTER_TOL = 1e-5  # of logits in float32: merging adds the same products in another order


def verify(task: VerifyTask, reporter: "Reporter") -> Verification:
    """Load the release in a new process with transformers alone, offline and without remote code.

    Its adapter, if any, is loaded onto the base model with PEFT and must give the merged model's logits.

    Raises:
        IntegrityError: It does not load, tensors are missing or unexpected, or the loss is not the checkpoint's.
    """
    quiet_libraries()
    directory, checkpoint_dir = task.directory, task.checkpoint_dir
    reporter.progress("verify release", 0, 2)
    found = _load_elsewhere(directory, task.base_model_dir if (directory / ADAPTER).is_dir() else None)
    if found["num_missing"] or found["num_unexpected"] or found["num_mismatched"]:
        raise IntegrityError(
            f"{directory} lacks {found['num_missing']} tensors, has {found['num_unexpected']} that the model does not "
            f"know and {found['num_mismatched']} of another shape. Materialise the checkpoint again."
        )
    reporter.progress("verify release", 1, 2)
    model = load_model(checkpoint_dir)
    expected, _ = reload_check.loss_and_logits(model, reload_check.fixed_batch(str(checkpoint_dir)))
    reporter.progress("verify release", 2, 2)
    if not math.isclose(found["loss"], expected, rel_tol=_REL_TOL):
        raise IntegrityError(
            f"{directory} has the loss {found['loss']:.8f} on a fixed picture, expected the checkpoint's "
            f"{expected:.8f}. Materialise the checkpoint again."
        )
    _require_same_adapter(directory, found)
    found["oldest_transformers"] = oldest_reader(directory)
    return Verification(**{f.name: found[f.name] for f in fields(Verification) if f.name in found})


def _require_same_adapter(directory: Path, found: dict[str, Any]) -> None:
    difference = found.get("adapter_max_logit_difference")
    if difference is None:
        return
    # merging rounds to the precision of the weights, which is all that two models in bf16 can share
    if found["dtype_eps"] < _ADAPTER_TOL:
        agrees, what = difference <= _ADAPTER_TOL, f"logits up to {difference:.2e} apart, expected {_ADAPTER_TOL:g}"
    else:
        agrees = math.isclose(found["adapter_loss"], found["loss"], rel_tol=found["dtype_eps"])
        what = f"the losses {found['adapter_loss']:.6f} and {found['loss']:.6f}"
    if not agrees:
        raise IntegrityError(
            f"The adapter in {directory} on its base model and the merged model give {what}. Check that the base model "
            "is what was trained on, and materialise the checkpoint again."
        )


def _load_elsewhere(directory: Path, base_model_dir: Path | None) -> dict[str, Any]:
    arguments = [str(path) for path in (directory, base_model_dir) if path is not None]
    # -I: neither PYTHONPATH nor the current folder can bring this project in
    command = [sys.executable, "-I", reload_check.__file__, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        cause = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise IntegrityError(
            f"{directory} cannot be loaded by transformers alone ({cause}). Materialise the checkpoint again."
        )
    found = json.loads(process.stdout.splitlines()[-1])
    assert not found["imported_mllm_assets"]
    return found
