"""Whether a recipe that mixes datasets evaluates on pictures that it trains on, from the files on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mllm_assets.artifacts import is_complete, read_manifest
from mllm_assets.data.checks import (
    MAX_EXAMPLES,
    CheckOutcome,
    counts_add_up,
    every_image_has_a_placeholder,
    splits_share_no_image,
)
from mllm_assets.data.dataset_info import entry_file, load_entry
from mllm_assets.data.sharegpt import entry_digest, load_rows
from mllm_assets.data.spec import QualitySpec
from mllm_assets.errors import DataError
from mllm_assets.quality.grouping import near_forest
from mllm_assets.quality.measure import measure_files
from mllm_assets.quality.probes import OWN_FILES, ImageMeasurement
from mllm_assets.quality.store import QualityStore


def datasets_share_no_image(
    data_dir: Path,
    train_entries: Sequence[str],
    eval_entries: Sequence[str],
    limits: QualitySpec | None = None,
    store: QualityStore | None = None,
) -> CheckOutcome:
    """No picture of a training entry, nor a near-duplicate, is in an evaluation entry of another dataset.

    Entries of one dataset are left out: `splits_share_no_image` has looked at them, by the dataset's own limits.

    Args:
        data_dir: LLaMA-Factory's `dataset_dir`.
        train_entries: What the recipe trains on.
        eval_entries: What it is evaluated on.
        limits: What counts as a near-duplicate; the defaults if None.
        store: Knows the measurements of bytes that were decoded before.

    Raises:
        DataError: An entry's file or rows are wrong; names them.
    """
    limits = limits or QualitySpec()
    origins = {entry: _origin(data_dir, entry) for entry in (*train_entries, *eval_entries)}
    checked = [(train, held) for train in train_entries for held in eval_entries if origins[train] != origins[held]]
    involved = sorted({entry for pair in checked for entry in pair})
    holders: dict[Path, set[str]] = {}
    for entry in involved:
        for path in {path for row in load_rows(data_dir, entry) for path in row.images}:
            holders.setdefault(path, set()).add(entry)
    groups = _groups(sorted(holders), limits, store)
    problems = []
    for train, held in checked:
        for members in groups:
            trained = [path for path in members if train in holders[path]]
            evaluated = [path for path in members if held in holders[path]]
            if trained and evaluated:
                names = [path.relative_to(data_dir.resolve()).as_posix() for path in (trained[0], evaluated[0])]
                problems.append(f"{names[0]} of {train} ~ {names[1]} of {held}")
    text = f"None of {len(holders)} pictures of different datasets is both trained on and evaluated on."
    if not checked:
        text = "All entries are of one dataset, whose split was checked."
    if problems:
        text = (
            f"{len(problems)} pictures are trained on in one dataset and evaluated on in another, the first: "
            f"{problems[0]}. Take one of the two entries out of the recipe, or the pictures out of one dataset."
        )
    return CheckOutcome(
        passed=not problems,
        description=text,
        metadata={"num_images": len(holders), "num_problems": len(problems), "examples": problems[:MAX_EXAMPLES]},
    )


def release_leaks(
    data_dir: Path,
    train_entries: Sequence[str],
    eval_entries: Sequence[str],
    trained_digests: Mapping[str, str],
    evaluated_digests: Mapping[str, str],
    store: QualityStore | None = None,
) -> list[str]:
    """Why the figures of a trained model may say too much, each in a sentence; from the files on disk.

    Looks inside the datasets too, whose split may be given and hold duplicates, and at what has changed since.

    Args:
        data_dir: LLaMA-Factory's `dataset_dir`.
        train_entries: What it was trained on.
        eval_entries: What it was evaluated on.
        trained_digests: `entry_digest` of each training entry when it was trained.
        evaluated_digests: Likewise of each evaluation entry when the model was asked.
        store: Knows the measurements of bytes that were decoded before.

    Raises:
        DataError: An entry's file or rows are wrong; names them.
    """
    changed = [name for name in train_entries if trained_digests.get(name, "") != entry_digest(data_dir, name)]
    found = [
        f"{name} is not what the model was trained on any more, so nothing shows that it was not trained on what it "
        "is evaluated on: materialise the checkpoint again."
        for name in changed
    ]
    found += [
        f"{name} is not what the model was evaluated on any more, so nothing shows that what it was evaluated on was "
        "not trained on: materialise predictions and eval_metrics again."
        for name in eval_entries
        if evaluated_digests.get(name, "") != entry_digest(data_dir, name)
    ]
    found += [f"{name} is both trained on and evaluated on." for name in eval_entries if name in train_entries]
    folders = {name: _version(data_dir, name) for name in (*train_entries, *eval_entries)}
    shared = {folders[name] for name in train_entries} & {folders[name] for name in eval_entries}
    for folder in sorted(folder for folder in shared if folder is not None):
        outcome = splits_share_no_image(folder, data_dir, store=store)
        found += [] if outcome.passed else [outcome.description]
    apart = datasets_share_no_image(data_dir, train_entries, eval_entries, store=store)
    return found + ([] if apart.passed else [apart.description])


def require_sound_versions(data_dir: Path, entries: Sequence[str]) -> None:
    """Check once more what a dataset's own checks claim of the versions that hold the entries, leaks aside.

    Raises:
        DataError: A row lacks an image or a placeholder, or the counts do not add up.
    """
    for folder in sorted({folder for name in entries if (folder := _version(data_dir, name)) is not None}):
        for outcome in (every_image_has_a_placeholder(folder, data_dir), counts_add_up(read_manifest(folder))):
            if not outcome.passed:
                raise DataError(f"{folder}: {outcome.description}")


def _version(data_dir: Path, entry: str) -> Path | None:
    """The version of a dataset made here that holds an entry's file."""
    folder = entry_file(data_dir, load_entry(data_dir, entry)).resolve().parent
    return folder if is_complete(folder) else None


def _origin(data_dir: Path, entry: str) -> str:
    """What an entry belongs to: the version of a dataset made here, or itself where a person wrote it."""
    folder = _version(data_dir, entry)
    return f"entry {entry}" if folder is None else str(folder)


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
