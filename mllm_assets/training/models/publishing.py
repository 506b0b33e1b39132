"""Publishing a trained model: written as a complete directory, reloaded strictly, and compared bit by bit."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mllm_assets.disk import no_space_is_an_error
from mllm_assets.errors import IntegrityError
from mllm_assets.training.models import value_head
from mllm_assets.training.models.adapters import adapted_modules, merged
from mllm_assets.training.models.load import base_model, batch_loss, cast_weights, load_config, load_model, release
from mllm_assets.training.models.older_transformers import add_old_spelling
from mllm_assets.training.models.weight_files import SharedFiles, Sharing, share_with

SENTENCEPIECE = "tokenizer.model"  # which transformers 5 does not write again, and llama.cpp's converter asks for
ADDED_TOKENS = "added_tokens.json"  # the tokens that it then takes beside those of tokenizer.model
# Of a loss that the same bits of weights give twice. A kernel may be another one for memory that begins elsewhere, and
# adds up in another order.
RELOAD_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}


def save_model(
    model: Any, processor: Any, directory: Path, *, source: Path, shared: SharedFiles | None = None
) -> dict[str, str]:
    """Write a complete Hugging Face directory: weights, configuration, tokenizer, chat template, processor.

    The generation settings of `source` are kept; `use_cache` is on again. Weight files that are `shared` are linked;
    returns their digests, by name.
    """
    model.config.get_text_config().use_cache = True
    model.config.use_cache = True
    linked: dict[str, str] = {}
    if shared is None:
        model.save_pretrained(directory)
    else:
        linked = shared.write(model, directory)
    processor.save_pretrained(directory)
    add_old_spelling(directory, processor.tokenizer)
    for name in ("generation_config.json", "chat_template.jinja", SENTENCEPIECE, ADDED_TOKENS):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    return linked


def publish_model(
    model: Any,
    processor: Any,
    run_dir: Path,
    source: Path,
    batch: dict[str, torch.Tensor],
    *,
    with_adapter: bool = True,
    sharing: Sharing | None = None,
) -> dict[str, Any]:
    """Write `model/` (and `adapter/` for LoRA, `with_adapter`), reload it strictly and compare one batch's loss.

    With `sharing`, what did not train is linked where it can be; `linked_files` are the digests of these files.

    Raises:
        IntegrityError: The loss differs, or the weights do not fit what was saved.
        MachineError: The disk is full.
    """
    config_dtype = load_config(source).dtype or torch.float32
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    staging, head = run_dir / ".model.tmp", value_head.detach(base_model(model))
    shutil.rmtree(run_dir / "model", ignore_errors=True)
    shutil.rmtree(run_dir / "adapter", ignore_errors=True)
    with no_space_is_an_error(staging, "the trained model", num_bytes):
        staging.mkdir()
        try:
            if hasattr(model, "merge_and_unload"):
                if with_adapter:
                    model.save_pretrained(staging / "adapter")
                adapted = adapted_modules(model)
                model = merged(model)
                sharing = sharing and replace(sharing, trained=_below(model, adapted))
            cast_weights(model, config_dtype)
            model.requires_grad_(False)
            shared = share_with(source, model, sharing) if sharing else None
            linked = save_model(model, processor, staging / "model", source=source, shared=shared)
            for part in sorted(staging.iterdir()):
                value_head.save(head, part)
                part.rename(run_dir / part.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    loss_saved, sums_saved, device = batch_loss(model, batch), bit_sums(model), model.device
    release(model)  # one of the two is in memory at a time
    reloaded = load_model(run_dir / "model", device=device).requires_grad_(False)  # raises on a missing key
    if other := sorted(name for name, bits in bit_sums(reloaded).items() if sums_saved.get(name) != bits):
        if shared is not None:
            shared.withdraw()
        raise IntegrityError(
            f"{len(other)} of {len(sums_saved)} tensors have other bits after reloading than before, such as "
            f"{other[0]}. Run again: it resumes from the last checkpoint and saves once more."
        )
    loss_reloaded = batch_loss(reloaded, batch)
    if not math.isclose(loss_saved, loss_reloaded, rel_tol=RELOAD_TOLERANCE[config_dtype], abs_tol=0.0):
        raise IntegrityError(
            f"The saved model gives another loss than the trained one: {loss_reloaded!r} after reloading, "
            f"{loss_saved!r} before. Run again: it resumes from the last checkpoint and saves once more."
        )
    losses = {"loss_saved": loss_saved, "loss_reloaded": loss_reloaded}
    return {"num_missing": 0, "num_unexpected": 0, **losses, "linked_files": linked}


def _below(model: Any, paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in model.state_dict() if any(name.startswith(f"{path}.") for path in paths))


def bit_sums(model: Any) -> dict[str, int]:
    """Return the sum of each tensor's bits, read as whole numbers: it differs where one bit does."""
    sums: dict[str, int] = {}
    for name, tensor in model.state_dict().items():
        as_numbers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        sums[name] = int(tensor.contiguous().view(as_numbers).sum(dtype=torch.int64))
    return sums
