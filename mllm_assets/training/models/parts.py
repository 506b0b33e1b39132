"""The parts of a model of a family that is not described here, found in its modules."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mllm_assets.errors import ModelError
from mllm_assets.families.family import Family

# Names of what turns a tower's output into tokens, where that is inside the tower, as in Qwen's, or a model of its own
PROJECTORS = ("merger", "projector", "connector", "aligner")


def with_parts(family: Family, model: Any) -> Family:
    """Return the family with the names of a model's parts: beside its decoder are towers, and what joins them to it.

    Raises:
        ModelError: It has no decoder that answers.
    """
    decoder = None if getattr(model.config, "is_encoder_decoder", False) else model.get_decoder()
    if decoder is None or decoder is model:
        raise ModelError(
            f"A model of type {family.model_type} has no decoder of its own that answers: only models with one train "
            "here. Use a model of another family."
        )
    head = model.get_output_embeddings()
    parts = list(_beside(model, "", decoder, head))
    names = {id(module): name for name, module in model.named_modules()}
    return replace(
        family,
        vision_keys=tuple(name for name, is_tower in parts if is_tower),
        projector_keys=tuple(name for name, is_tower in parts if not is_tower),
        language_keys=(names[id(decoder)], *([names[id(head)]] if head is not None else [])),
    )


def _beside(module: nn.Module, path: str, decoder: nn.Module, head: nn.Module | None) -> Iterator[tuple[str, bool]]:
    """Yield the path of each part beside the decoder, and whether it is a tower."""
    for name, _ in module.named_parameters(recurse=False):  # such as the token that ends a line of patches
        yield f"{path}{name}", False
    for name, child in module.named_children():
        if child is decoder or child is head:
            continue
        if any(inner is decoder for inner in child.modules()):
            yield from _beside(child, f"{path}{name}.", decoder, head)
        elif _joins(name) or not any(isinstance(inner, PreTrainedModel) for inner in child.modules()):
            yield f"{path}{name}", False
        else:
            yield from _of_tower(child, f"{path}{name}")


def _of_tower(tower: nn.Module, path: str) -> Iterator[tuple[str, bool]]:
    names = [name for name, _ in (*tower.named_children(), *tower.named_parameters(recurse=False))]
    inner = [name for name in names if _joins(name)]
    if not inner:
        yield path, True
        return
    for name in names:
        yield f"{path}.{name}", name not in inner


def _joins(name: str) -> bool:
    return any(word in name for word in PROJECTORS)
