"""Loading a model of a known family, its processor, and its shape on the `meta` device; publishing it strictly."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from mllm_assets.artifacts import digest_json, sha256_file
from mllm_assets.errors import IntegrityError, ModelError
from mllm_assets.training import processors
from mllm_assets.training.checkpoints import no_space_is_an_error
from mllm_assets.training.families import FAMILIES, find_family
from mllm_assets.training.quantization import Quantization, keep_trainable


def quiet_libraries() -> None:
    """Keep transformers' own bars and advice off the terminal: progress is ours to report."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_config(directory: Path) -> Any:
    """Read a model directory's configuration.

    Raises:
        ModelError: There is no such directory, or it holds no model of a known family.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{directory} is no model directory: it has no config.json. Point to a Hugging Face model directory, for "
            f"example the `model` folder of a run, or download one into pretrains/."
        )
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}). Download the model again.") from None
    find_family(model_type, str(directory))
    return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def load_processor(directory: Path) -> Any:
    """Load a model's processor: `tokenizer`, `image_processor`, and what its family's image slots read.

    Raises:
        ModelError: Its files are missing or damaged.
    """
    config = load_config(directory)
    return processors.load(directory, FAMILIES[config.model_type], config)


def load_model(
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantization: Quantization | None = None,
) -> Any:
    """Load weights strictly: every key of the model is in the files and every key of the files in the model.

    Args:
        directory: A Hugging Face model directory with safetensors.
        dtype: Of all weights; None keeps the directory's own.
        device: Where the model goes.
        quantization: How to hold frozen linear layers. Computed on the CPU, so that every device has the same values.

    Raises:
        ModelError: No known family, no weights, or keys are missing or unexpected.
    """
    load_config(directory)
    quantized: dict[str, Any] = {}
    if quantization is not None:
        quantized = {"quantization_config": quantization.config(dtype or torch.float32), "device_map": {"": "cpu"}}
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            directory,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            **quantized,
        )
    except (OSError, ValueError, RuntimeError) as error:
        if not any(directory.glob("*.safetensors")) and (pickled := sorted(directory.glob("*.bin"))):
            raise ModelError(
                f"{pickled[0]} is a pickle, which can run code when it is loaded, and no safetensors are beside it. "
                "Where you trust it: AutoModelForImageTextToText.from_pretrained(DIR).save_pretrained(NEW_DIR)."
            ) from None
        raise ModelError(
            f"The weights in {directory} cannot be loaded ({error}). Make or download them again."
        ) from error
    model, info = loaded
    problems = {kind: sorted(info[f"{kind}_keys"], key=str) for kind in ("missing", "unexpected", "mismatched")}
    if any(problems.values()):
        counts = ", ".join(f"{len(keys)} {kind}" for kind, keys in problems.items() if keys)
        first = next(keys[0] for keys in problems.values() if keys)
        raise ModelError(
            f"The weights in {directory} do not fit the model: {counts} keys, such as {first}. "
            f"Make or download the model again."
        )
    keep_trainable(model)
    return model.to(device)


def model_on_meta(config: Any, *, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model's shape without any memory behind it."""
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    return model.to(dtype)


def save_model(model: Any, processor: Any, directory: Path, *, source: Path) -> None:
    """Write a complete Hugging Face directory: weights, configuration, tokenizer, chat template, processor.

    What `source` says of generation is kept; `use_cache` is on again.
    """
    model.config.text_config.use_cache = True
    model.config.use_cache = True
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    for name in ("generation_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def publish_model(
    model: Any, processor: Any, run_dir: Path, source: Path, batch: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Write `model/` (and `adapter/` for LoRA), reload it strictly and compare one batch's loss.

    Raises:
        IntegrityError: The loss differs, or the weights do not fit what was saved.
        MachineError: The disk is full.
    """
    config_dtype = load_config(source).dtype or torch.float32
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    staging = run_dir / ".model.tmp"
    shutil.rmtree(run_dir / "model", ignore_errors=True)
    shutil.rmtree(run_dir / "adapter", ignore_errors=True)
    with no_space_is_an_error(staging, "the trained model", num_bytes):
        staging.mkdir()
        try:
            if hasattr(model, "merge_and_unload"):
                model.save_pretrained(staging / "adapter")
                model = model.merge_and_unload()
            cast_weights(model, config_dtype)
            model.requires_grad_(False)
            save_model(model, processor, staging / "model", source=source)
            for part in sorted(staging.iterdir()):
                part.rename(run_dir / part.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    loss_saved = batch_loss(model, batch)
    device = model.device
    release(model)  # one of the two is in memory at a time
    reloaded = load_model(run_dir / "model", device=device)  # raises on a missing or unexpected key
    loss_reloaded = batch_loss(reloaded, batch)
    tolerance = 0.0 if device.type == "cpu" else 1e-3
    if not math.isclose(loss_saved, loss_reloaded, rel_tol=tolerance, abs_tol=0.0):
        raise IntegrityError(
            f"The saved model gives another loss than the trained one: {loss_reloaded!r} after reloading, "
            f"{loss_saved!r} before. Run again: it goes on from the last checkpoint and saves once more."
        )
    return {"num_missing": 0, "num_unexpected": 0, "loss_saved": loss_saved, "loss_reloaded": loss_reloaded}


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Cast what files hold, and leave the model as `load_model` with that dtype would make it from them.

    `model.to(dtype)` would round the rotary frequencies, and keeps the rounding of Gemma's embedding scale from before:
    neither is in a file.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale.data = torch.tensor(module.scalar_embed_scale, device=model.device).to(dtype)


def release(model: Any) -> None:
    """Give a model's memory back, whoever still holds its parameters, such as an optimizer."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


@torch.no_grad()
def batch_loss(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Return the mean loss in nats over a batch's supervised tokens, without dropout or autocast."""
    model.eval()
    moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
    if "pixel_values" in moved:
        moved["pixel_values"] = moved["pixel_values"].to(model.dtype)
    return float(model(**moved, use_cache=False).loss)


def weights_digest(directory: Path) -> str:
    """Return a digest over a directory's weight files alone, sha256."""
    return digest_json({path.name: sha256_file(path) for path in sorted(directory.glob("*.safetensors"))})


def base_model(model: Any) -> Any:
    """Return the model inside, which LoRA wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
