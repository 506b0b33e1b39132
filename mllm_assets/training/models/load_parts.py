"""Some modules of a model, read without the rest of it: the tower of gemma-3-4b is a tenth of its 8.6 GB."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mllm_assets.training.models.load import load_config, load_model, model_on_meta
from mllm_assets.training.models.weight_files import weight_map


def load_modules(directory: Path, paths: Sequence[str], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Load the modules at `paths` as `load_model(directory)` has them, cast to `dtype`, frozen and on the CPU.

    The whole model is read where its files do not hold the tensors of these modules one by one, under names of their
    own or older ones.

    Raises:
        ModelError: As `load_model`.
    """
    config = load_config(directory)
    stored: torch.dtype | None = config.dtype
    model = model_on_meta(config, dtype=stored or torch.float32).eval()
    files = _places(model, paths, directory)
    if files is None or stored is None:
        model = load_model(directory)
    else:
        for path in paths:
            model.get_submodule(path).to_empty(device="cpu")
        _fill_buffers(model)
        _read(model, files, directory, stored)
    return {path: model.get_submodule(path).to(dtype=dtype).requires_grad_(False) for path in paths}


def places_in(model: Any, directory: Path, files: Collection[str]) -> dict[str, dict[str, str]] | None:
    """Where each tensor of these weight files belongs in a loaded model, by file. None where one has no place in it."""
    named = {file: names for file, names in _named(model, directory).items() if file in files}
    if not all(name is not None for names in named.values() for name in names.values()):
        return None
    return {file: {in_file: str(name) for in_file, name in names.items()} for file, names in named.items()}


def put_in(model: Any, places: Mapping[str, Mapping[str, str]], directory: Path) -> None:
    """Read the tensors of `places_in` in place of those that a loaded model has."""
    _read(model, places, directory, model.dtype)


def _places(model: Any, paths: Sequence[str], directory: Path) -> dict[str, dict[str, str]] | None:
    """Return by file what of it is wanted: its names of tensors, and those of the model. None where one is missing."""
    missing = {name for name in model.state_dict() if any(name.startswith(f"{path}.") for path in paths)}
    found: dict[str, dict[str, str]] = {}
    for file, names in _named(model, directory).items():
        for in_file, name in names.items():
            if name is not None and name in missing:
                missing.remove(name)
                found.setdefault(file, {})[in_file] = name
    return None if missing else found


def _named(model: Any, directory: Path) -> dict[str, dict[str, str | None]]:
    """The model's names of the tensors in each file; None where it holds them in pieces, together, or not at all."""
    state, prefix = model.state_dict(), model.base_model_prefix
    transforms = get_model_conversion_mapping(model)
    renamings = [some for some in transforms if isinstance(some, WeightRenaming)]
    converters = [some for some in transforms if isinstance(some, WeightConverter)]
    found: dict[str, dict[str, str | None]] = {}
    for in_file, file in weight_map(directory).items():  # renamed as the library does when it loads
        name, converter = rename_source_key(in_file, renamings, converters, prefix, state)
        if name not in state and in_file in state:
            name, converter = in_file, None
        found.setdefault(file, {})[in_file] = name if name in state and converter is None else None
    return found


def _fill_buffers(model: Any) -> None:
    """Make what no file holds, such as the numbers of places, as the library does after loading."""
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    model.initialize_weights()


@torch.no_grad()
def _read(model: Any, files: Mapping[str, Mapping[str, str]], directory: Path, stored: torch.dtype) -> None:
    tensors = model.state_dict(keep_vars=True)
    with ExitStack() as opened:
        for name, wanted in files.items():
            file = opened.enter_context(safe_open(directory / name, framework="pt"))
            for in_file, here in wanted.items():
                tensor = file.get_tensor(in_file)
                tensors[here].copy_(tensor.to(stored) if tensor.is_floating_point() else tensor)
