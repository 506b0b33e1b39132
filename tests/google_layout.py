"""A model in the layout of google/gemma-3-4b-it: two files, and Google's names of the tower's tensors."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


def in_google_layout(source: Path, directory: Path) -> Path:
    """Copy a Gemma 3 of one file; the second has the language model's last layer, as Google's has its last layers."""
    shutil.copytree(source, directory)
    tensors = google_names(load_file(directory / "model.safetensors"))
    (directory / "model.safetensors").unlink()
    last = max(int(name.split(".")[3]) for name in tensors if name.startswith("language_model.model.layers."))
    files = {name: SECOND if name.startswith(f"language_model.model.layers.{last}.") else FIRST for name in tensors}
    for file in (FIRST, SECOND):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, directory / file, {"format": "pt"})
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return directory


def google_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Transformers 5 calls `vision_tower.*` what Google's files, and llama.cpp, call `vision_tower.vision_model.*`."""
    old, new = "vision_tower.", "vision_tower.vision_model."
    return {name if new in name else name.replace(old, new, 1): tensor for name, tensor in tensors.items()}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's files."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
