"""The weight files of a trained model: what did not train is its base's, linked and not written once more.

A file of the base in which nothing trained is linked as it is. Of a file in which something did, the rest is kept once
for all runs (`frozen_weights`) and linked from there, where it is large; what trained is then a file of its own. So a
projector of 12 MB writes 12 MB, not the 8.6 GB of its model, from the second run on.

Nothing is linked that was cast, and whoever publishes compares every tensor after reloading. Nothing here writes into a
published model; what somebody else writes into a file of two names is found by its digest.
"""

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from mllm_assets.artifacts import write_json_atomic
from mllm_assets.file_digests import FileDigests
from mllm_assets.training.models.frozen_weights import frozen_part, withdraw

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
KEPT_FROM_BYTES = 64 * 2**20  # smaller rests of a file are written with what trained


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharing:
    """What a published model may share with the one that it was trained from.

    `trained` names all parameters that differ from it, of the model without adapters. `kept` is where parts of files
    are kept for all runs, or None; `digests` are of the base's files, which are not to be read again.
    """

    trained: Collection[str]
    kept: Path | None
    digests: FileDigests


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """A weight file: its tensors by their names in it, and a file that has just these bytes, where there is one."""

    tensors: Mapping[str, torch.Tensor]
    origin: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedFiles:
    """How a model's tensors are spread over files, and which of these exist already."""

    pieces: Mapping[str, _Piece]
    index: Path | None  # of the base, where its files keep their names
    digests: FileDigests

    def write(self, model: Any, directory: Path) -> dict[str, str]:
        """Write configuration and weights; return the digests of the files that were linked, by name."""
        model.save_pretrained(directory, state_dict={})
        (directory / ONE_FILE).unlink(missing_ok=True)  # empty
        linked = {}
        for name, piece in self.pieces.items():
            if piece.origin is not None:
                linked[name] = self.digests.link(piece.origin, directory / name)
            else:
                whole = {key: tensor.contiguous() for key, tensor in piece.tensors.items()}
                save_file(whole, directory / name, metadata={"format": "pt"})
        if self.index is not None:
            shutil.copyfile(self.index, directory / INDEX)
        else:
            weight_map = {key: name for name, piece in self.pieces.items() for key in piece.tensors}
            size = sum(t.numel() * t.element_size() for piece in self.pieces.values() for t in piece.tensors.values())
            write_json_atomic(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        return linked

    def withdraw(self) -> None:
        """Let no other run use the parts that are kept for all: one of them is not what it should be."""
        for piece in self.pieces.values():
            if piece.origin is not None:
                withdraw(piece.origin)


def share_with(source: Path, model: Any, sharing: Sharing) -> SharedFiles | None:
    """Find what the model's files can share with those of `source`; None where that is nothing.

    Nor is there anything where the model's tensors have other names, shapes or dtypes than the files.
    """
    state = remove_tied_weights_from_state_dict(model.state_dict(), model)
    if not sharing.trained or not state.keys() > set(sharing.trained):
        return None
    changed = revert_weight_conversion(model, {name: state[name] for name in sharing.trained}).keys()
    named = revert_weight_conversion(model, state)
    held = weight_map(source)
    if held.keys() != named.keys():
        return None
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, file in held.items():
        files.setdefault(file, {})[name] = named[name]
    if not all(_describes(source / file, tensors, changed) for file, tensors in files.items()):
        return None
    unchanged = {file for file, tensors in files.items() if not changed & tensors.keys()}
    rests = {file: {name: t for name, t in tensors.items() if name not in changed} for file, tensors in files.items()}
    split = {file for file, rest in rests.items() if sharing.kept and file not in unchanged and _large(rest)}
    if split:
        return _renumbered(source, files, {file: rests[file] for file in split}, unchanged, sharing)
    if not unchanged:
        return None
    pieces = {
        file: _Piece(tensors=tensors, origin=source / file if file in unchanged else None)
        for file, tensors in files.items()
    }
    return SharedFiles(pieces=pieces, index=source / INDEX, digests=sharing.digests)


def _renumbered(
    source: Path,
    files: Mapping[str, Mapping[str, torch.Tensor]],
    split: Mapping[str, Mapping[str, torch.Tensor]],
    unchanged: Collection[str],
    sharing: Sharing,
) -> SharedFiles:
    """One file more than what is linked: of that which trained, and small rests of files."""
    pieces, own = [], {}
    for file, tensors in files.items():
        if file in unchanged:
            pieces.append(_Piece(tensors=tensors, origin=source / file))
            continue
        rest = split.get(file, {})
        if rest:
            part = frozen_part(source / file, rest.keys(), Path(str(sharing.kept)), sharing.digests)
            pieces.append(_Piece(tensors=rest, origin=part))
        own |= {name: tensor for name, tensor in tensors.items() if name not in rest}
    pieces.append(_Piece(tensors=own))
    numbered = {f"model-{n:05d}-of-{len(pieces):05d}.safetensors": piece for n, piece in enumerate(pieces, 1)}
    return SharedFiles(pieces=numbered, index=None, digests=sharing.digests)


def weight_map(directory: Path) -> dict[str, str]:
    """The file of each tensor, by its name there; empty without weights."""
    if (directory / INDEX).is_file():
        return json.loads((directory / INDEX).read_bytes())["weight_map"]
    if not (directory / ONE_FILE).is_file():
        return {}
    with safe_open(directory / ONE_FILE, framework="pt") as file:
        return dict.fromkeys(file.keys(), ONE_FILE)


def _large(tensors: Mapping[str, torch.Tensor]) -> bool:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) >= KEPT_FROM_BYTES


def _describes(path: Path, tensors: Mapping[str, torch.Tensor], changed: Collection[str]) -> bool:
    """Whether a file holds exactly these tensors by name, shape and dtype; only its header is read.

    One that is `changed` may have got another shape: it is not linked.
    """
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != tensors.keys():
            return False
        slices = {name: file.get_slice(name) for name in tensors}
        return all(
            list(tensor.shape) == slices[name].get_shape() and _DTYPES.get(slices[name].get_dtype()) == tensor.dtype
            for name, tensor in tensors.items()
            if name not in changed
        )


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
