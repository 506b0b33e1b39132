"""Loads a released model the way its users will, and compares it with the checkpoint that it was made from."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllm_assets.errors import IntegrityError
from mllm_assets.training.model import load_model, quiet_libraries

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter

_QUESTION = "What is in this picture?"
_ANSWER = "A gradient."
_REL_TOL = 1e-6  # both run in one process on one device; only the library's loader differs


def verify(directory: Path, checkpoint_dir: Path, reporter: "Reporter") -> dict[str, Any]:
    """Load `directory` with `AutoModelForImageTextToText` and `AutoProcessor`, offline and without remote code.

    Returns:
        num_missing, num_unexpected (both 0), num_params, and loss (nats a token on a fixed picture and text).

    Raises:
        IntegrityError: It does not load, tensors are missing or unexpected, or the loss is not the checkpoint's.
    """
    quiet_libraries()
    reporter.progress("verify release", 0, 2)
    model, info = _load(directory)
    num_missing, num_unexpected = (len(info[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    if num_missing or num_unexpected or info["mismatched_keys"]:
        raise IntegrityError(
            f"{directory} lacks {num_missing} tensors, has {num_unexpected} that the model does not know and "
            f"{len(info['mismatched_keys'])} of another shape. Materialise the checkpoint again."
        )
    batch = _fixed_batch(directory)
    loss, num_params = _loss(model, batch), model.num_parameters()
    del model
    reporter.progress("verify release", 1, 2)
    expected = _loss(load_model(checkpoint_dir), batch)
    reporter.progress("verify release", 2, 2)
    if not math.isclose(loss, expected, rel_tol=_REL_TOL):
        raise IntegrityError(
            f"{directory} has the loss {loss:.8f} on a fixed picture, expected the checkpoint's {expected:.8f}. "
            "Materialise the checkpoint again."
        )
    return {"num_missing": num_missing, "num_unexpected": num_unexpected, "num_params": num_params, "loss": loss}


def _load(directory: Path) -> tuple[Any, dict[str, Any]]:
    loader: Any = AutoModelForImageTextToText
    try:
        return loader.from_pretrained(
            directory, dtype="auto", output_loading_info=True, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise IntegrityError(
            f"{directory} cannot be loaded by AutoModelForImageTextToText ({error}). Materialise the checkpoint again."
        ) from error


def _fixed_batch(directory: Path) -> dict[str, Any]:
    """A gradient with a question and an answer, through the released processor and chat template."""
    picture = Image.merge(
        "RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("L", (256, 256), 128)]
    )
    question = [{"type": "image", "image": picture}, {"type": "text", "text": _QUESTION}]
    conversation = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]},
    ]
    try:
        processor = AutoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        batch = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{directory} has no usable processor ({error}). Materialise the checkpoint again."
        ) from error
    return {**batch, "labels": batch["input_ids"]}


@torch.inference_mode()
def _loss(model: Any, batch: dict[str, Any]) -> float:
    pixels = batch["pixel_values"].to(model.dtype)
    return float(model.eval()(**{**batch, "pixel_values": pixels}).loss)
