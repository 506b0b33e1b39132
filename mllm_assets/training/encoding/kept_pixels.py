"""Pixels of pictures that were read before: a small dataset is decoded once, and not again in each epoch."""

from collections.abc import Mapping
from pathlib import Path

import torch

MOST_BYTES = 64 << 20  # a thousand pictures of 128 x 128; of large ones a few, which cost little


class KeptPixels:
    """What a tower sees of pictures, as far as there is room: the first ones that were read."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._room = most_bytes
        self._pixels: dict[Path, torch.Tensor] = {}

    def __contains__(self, path: Path) -> bool:
        return path in self._pixels

    def __getitem__(self, path: Path) -> torch.Tensor:
        return self._pixels[path]

    def add(self, pixels_CHW: Mapping[Path, torch.Tensor]) -> None:
        """Keep those for which there is room."""
        for path, pixels in pixels_CHW.items():
            if pixels.nbytes <= self._room:
                self._room -= pixels.nbytes
                self._pixels[path] = pixels.clone()
