"""The weight files of a trained model where most of them are its base's: what did not train is linked, not written.

A model of several files is written as its base is laid out. Files are only linked where nothing in them trained and
nothing was cast, and whoever publishes them compares every tensor after reloading. A linked file is one file with two
names: nothing here writes into a published model, and what somebody else writes is found by its digest.
"""

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from mllm_assets.artifacts import link_or_copy

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedFiles:
    """How a model's tensors are spread over files, and which of these are its base's."""

    files: dict[str, dict[str, torch.Tensor]]  # file -> tensors by their names in it
    unchanged: frozenset[str]

    def write(self, model: Any, source: Path, directory: Path) -> None:
        """Write the model's configuration, and its weights under the names and in the files of `source`."""
        model.save_pretrained(directory, state_dict={})
        (directory / ONE_FILE).unlink(missing_ok=True)  # empty
        for file, tensors in self.files.items():
            if file in self.unchanged:
                link_or_copy(source / file, directory / file)
            else:
                whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
                save_file(whole, directory / file, metadata={"format": "pt"})
        shutil.copyfile(source / INDEX, directory / INDEX)


def share_with(source: Path, model: Any, trained: Collection[str]) -> SharedFiles | None:
    """Find the files of `source` that hold nothing of the parameters that trained; None where there is none.

    Nor is there one where the model's tensors have other names, shapes or dtypes than the files.
    """
    if not trained or not (source / INDEX).is_file():
        return None
    state = remove_tied_weights_from_state_dict(model.state_dict(), model)
    if any(name not in state for name in trained):
        return None
    changed = revert_weight_conversion(model, {name: state[name] for name in trained}).keys()
    named = revert_weight_conversion(model, state)
    weight_map: dict[str, str] = json.loads((source / INDEX).read_bytes())["weight_map"]
    if weight_map.keys() != named.keys():
        return None
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, file in weight_map.items():
        files.setdefault(file, {})[name] = named[name]
    if not all(_describes(source / file, tensors) for file, tensors in files.items()):
        return None
    unchanged = frozenset(file for file, tensors in files.items() if not changed & tensors.keys())
    return SharedFiles(files=files, unchanged=unchanged) if unchanged else None


def _describes(path: Path, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether a file holds exactly these tensors by name, shape and dtype; only its header is read."""
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != tensors.keys():
            return False
        slices = {name: file.get_slice(name) for name in tensors}
        return all(
            list(tensor.shape) == slices[name].get_shape() and _DTYPES.get(slices[name].get_dtype()) == tensor.dtype
            for name, tensor in tensors.items()
        )


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
