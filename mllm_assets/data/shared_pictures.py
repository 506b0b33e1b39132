"""Which pictures two entries have in common, exactly or nearly, from the files on disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mllm_assets.data.sharegpt import load_rows
from mllm_assets.data.spec import QualitySpec
from mllm_assets.quality.grouping import near_forest
from mllm_assets.quality.measure import measure_files
from mllm_assets.quality.probes import OWN_FILES, ImageMeasurement
from mllm_assets.quality.store import QualityStore


@dataclass(frozen=True, slots=True)
class Holder:
    """An entry of a `dataset_info.json`, and what people are told it is."""

    data_dir: Path
    entry: str
    title: str

    def images(self) -> set[Path]:
        return {path for row in load_rows(self.data_dir, self.entry) for path in row.images}

    def named(self, path: Path) -> str:
        return f"{path.relative_to(self.data_dir.resolve()).as_posix()} of {self.title}"


def find_shared(
    pairs: Sequence[tuple[Holder, Holder]], limits: QualitySpec, store: QualityStore | None
) -> tuple[list[tuple[Holder, str]], int]:
    """Compare the pictures of pairs of entries.

    Args:
        pairs: What is trained on, and what is evaluated on.
        limits: What counts as a near-duplicate.
        store: Knows the measurements of bytes that were decoded before.

    Returns:
        For each picture that both have: what is trained on, and a text that names both files. The number of files.

    Raises:
        DataError: An entry's file or rows are wrong; names them.
    """
    images = {holder: holder.images() for holder in dict.fromkeys(holder for pair in pairs for holder in pair)}
    paths = sorted(set().union(*images.values()))
    groups = _groups(paths, limits, store)
    found = []
    for train, held in pairs:
        for members in groups:
            trained = [path for path in members if path in images[train]]
            evaluated = [path for path in members if path in images[held]]
            if trained and evaluated:
                found.append((train, f"{train.named(trained[0])} ~ {held.named(evaluated[0])}"))
    return found, len(paths)


def _groups(paths: list[Path], limits: QualitySpec, store: QualityStore | None) -> list[list[Path]]:
    """Files by what they show; one that cannot be decoded is like its own copies only."""
    measured = measure_files(paths, OWN_FILES, store) if paths else []
    whole = [number for number, image in enumerate(measured) if image.defect is None]
    hashes = np.array([measured[number].phash_64 for number in whole], np.uint64)
    colors = np.array([_colors(measured[number]) for number in whole], np.uint8).reshape(len(whole), 48)
    forest = near_forest(
        hashes,
        colors,
        distance_bits=limits.duplicate_distance_bits,
        color_distance=limits.duplicate_color_distance,
    )
    members: dict[str, list[Path]] = {}
    names = dict(zip(whole, forest.groups_N.tolist(), strict=True))
    for number, path in enumerate(paths):
        key = f"group {names[number]}" if number in names else f"bytes {measured[number].image_sha256}"
        members.setdefault(key, []).append(path)
    return list(members.values())


def _colors(image: ImageMeasurement) -> list[int]:
    return list(bytes.fromhex(image.color_48 or ""))
