"""Whether a model is evaluated on pictures that it, or a stage before it, trained on, from the files on disk."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm_assets.artifacts import is_complete, read_manifest
from mllm_assets.data.curate.checks import (
    MAX_EXAMPLES,
    CheckOutcome,
    counts_add_up,
    every_image_has_a_placeholder,
    splits_share_no_image,
)
from mllm_assets.data.ingest.spec import QualitySpec
from mllm_assets.data.quality.grouping import near_forest
from mllm_assets.data.quality.measure import measure_files
from mllm_assets.data.quality.probes import OWN_FILES
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.sharegpt.dataset import Dataset, Entry
from mllm_assets.errors import DataError, MllmAssetsError
from mllm_assets.file_digests import FileDigests


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One training run of a lineage.

    Attributes:
        recipe: The recipe's slug.
        fingerprint: The run's name.
        data_dir: The folder of the `dataset_info.json` that it read.
        media_dir: The folder that its images' paths are relative to, if it is another one.
        entries: The digest of each training entry at that time, by name.
    """

    recipe: str
    fingerprint: str
    data_dir: Path
    entries: Mapping[str, str]
    media_dir: Path | None = None

    @property
    def title(self) -> str:
        """Its name in messages."""
        return f"the earlier stage {self.recipe} (run {self.fingerprint})"

    def to_dict(self, root: Path) -> dict[str, Any]:
        """JSON-able values; the path is relative to the project, which may move."""
        elsewhere = {"media_dir": os.path.relpath(self.media_dir, root)} if self.media_dir else {}
        return {
            "recipe": self.recipe,
            "fingerprint": self.fingerprint,
            "dataset_dir": os.path.relpath(self.data_dir, root),
            **elsewhere,
            "entries": dict(self.entries),
        }


@dataclass(frozen=True, slots=True)
class Holder:
    """An entry of a dataset, and its name in messages."""

    entry: Entry
    title: str

    def named(self, path: Path) -> str:
        return f"{path.relative_to(self.entry.dataset.folder).as_posix()} of {self.title}"


def datasets_share_no_image(
    dataset: Dataset,
    train_entries: Sequence[str],
    eval_entries: Sequence[str],
    store: QualityStore | None = None,
    stages: Sequence[Stage] = (),
) -> CheckOutcome:
    """No picture of a training entry, nor a near-duplicate, is in an evaluation entry of another dataset.

    Entries of one dataset are left out: `splits_share_no_image` checks them, by the dataset's own limits; here those
    of `QualitySpec` apply by default. What the model was trained on in `stages` before counts as well, as the entries
    are now; one that is gone is named.

    Raises:
        DataError: An entry's file or rows are wrong; names them.
    """
    evaluated = [Holder(dataset.entry(entry), entry) for entry in dict.fromkeys(eval_entries)]
    earlier, gone = _earlier(stages, dataset) if evaluated else ([], [])
    own = [Holder(dataset.entry(entry), entry) for entry in train_entries]
    # an entry that one stage trains on and the next evaluates on was not checked before
    pairs = [(train, held) for train in own for held in evaluated if _origin(train.entry) != _origin(held.entry)]
    pairs += [
        (train, held)
        for train in earlier
        for held in evaluated
        if _origin(train.entry) != _origin(held.entry) or train.entry.name == held.entry.name
    ]
    found, num_images = _find_shared(pairs, store, dataset.digests)
    problems = [text for _, text in found]
    text = f"None of {num_images} pictures of different datasets is both trained on and evaluated on."
    if not pairs:
        text = "All entries are of one dataset, whose split was checked."
    if problems:
        text = _describe(
            [text for train, text in found if train in own], [text for train, text in found if train not in own]
        )
    if gone:
        text += f" Not looked at, because it cannot be read any more: {', '.join(gone)}."
    return CheckOutcome(
        passed=not problems,
        description=text,
        metadata={"num_images": num_images, "num_problems": len(problems), "examples": problems[:MAX_EXAMPLES]},
    )


def _earlier(stages: Sequence[Stage], dataset: Dataset) -> tuple[list[Holder], list[str]]:
    """What earlier stages trained on, and what of it cannot be read any more."""
    holders, gone = [], []
    for stage in stages:
        for name in stage.entries:
            try:
                entry = dataset.at(stage.data_dir, stage.media_dir).entry(name)
                assert entry.num_rows
            except MllmAssetsError:
                gone.append(f"{name} of {stage.title}")
            else:
                holders.append(Holder(entry, f"{name}, which {stage.title} trained on,"))
    return holders, gone


def _describe(own: Sequence[str], earlier: Sequence[str]) -> str:
    texts = []
    if own:
        texts.append(
            f"{len(own)} pictures are trained on in one dataset and evaluated on in another, the first: "
            f"{own[0]}. Take one of the two entries out of the recipe, or the pictures out of one dataset."
        )
    if earlier:
        texts.append(
            f"{len(earlier)} pictures that are evaluated on were trained on in an earlier stage, the first: "
            f"{earlier[0]}. Evaluate on other entries, start from another model, or take the pictures out of the "
            "entry that the stage trains on and train it again."
        )
    return " ".join(texts)


def release_leaks(
    dataset: Dataset,
    train_entries: Sequence[str],
    eval_entries: Sequence[str],
    trained_digests: Mapping[str, str],
    evaluated_digests: Mapping[str, str],
    store: QualityStore | None = None,
    stages: Sequence[Stage] = (),
) -> list[str]:
    """Why the metrics of a trained model may be too good, each in a sentence; from the files on disk.

    Looks inside the datasets too, whose split may be given and hold duplicates, and at what has changed since the
    entries had `trained_digests` and `evaluated_digests`. The model went through `stages` before.

    Raises:
        DataError: An entry's file or rows are wrong; names them.
    """
    found = [
        f"{name} is not what the model was trained on any more, so nothing shows that it was not trained on what it "
        "is evaluated on: materialise the checkpoint again."
        for name in train_entries
        if trained_digests.get(name, "") != dataset.entry(name).digest
    ]
    found += [
        f"{name} is not what the model was evaluated on any more, so nothing shows that what it was evaluated on was "
        "not trained on: materialise predictions and eval_metrics again."
        for name in eval_entries
        if evaluated_digests.get(name, "") != dataset.entry(name).digest
    ]
    found += [
        f"{name} is not what {stage.title} was trained on any more, so nothing shows that this stage was not trained "
        f"on what the model is evaluated on: materialise the checkpoint of {stage.recipe}, then this one, again."
        for stage in stages
        for name, digest in stage.entries.items()
        if digest != _digest_now(dataset.at(stage.data_dir, stage.media_dir), name)
    ]
    found += [f"{name} is both trained on and evaluated on." for name in eval_entries if name in train_entries]
    earlier, _ = _earlier(stages, dataset)
    trained = {dataset.entry(name).version for name in train_entries} | {holder.entry.version for holder in earlier}
    shared = trained & {dataset.entry(name).version for name in eval_entries}
    for folder in sorted(folder for folder in shared if folder is not None):
        outcome = splits_share_no_image(folder, dataset.folder, store=store, digests=dataset.digests)
        found += [] if outcome.passed else [outcome.description]
    apart = datasets_share_no_image(dataset, train_entries, eval_entries, store=store, stages=stages)
    return found + ([] if apart.passed else [apart.description])


def require_sound_versions(dataset: Dataset, entries: Sequence[str]) -> None:
    """Repeat a dataset's own checks, except for leaks, on the versions that contain the entries.

    Raises:
        DataError: A row lacks an image or a placeholder, or the counts do not add up.
    """
    for folder in sorted({folder for name in entries if (folder := dataset.entry(name).version) is not None}):
        for outcome in (every_image_has_a_placeholder(folder, dataset.data_dir), counts_add_up(read_manifest(folder))):
            if not outcome.passed:
                raise DataError(f"{folder}: {outcome.description}")


def _origin(entry: Entry) -> Path | Entry:
    """What an entry belongs to: the version of a dataset made here, or itself for an external entry."""
    return entry.version or entry


def _digest_now(dataset: Dataset, name: str) -> str | None:
    """The entry's digest now; None if it is gone or cannot be read any more."""
    try:
        return dataset.entry(name).digest
    except MllmAssetsError:
        return None


def _find_shared(
    pairs: Sequence[tuple[Holder, Holder]], store: QualityStore | None, digests: FileDigests
) -> tuple[list[tuple[Holder, str]], int]:
    """Compare the pictures and videos of pairs of entries, one that is trained on and one that is evaluated on.

    Returns:
        For each file that both have: what is trained on, and a text that names both files. The number of files.
    """
    images = {holder: holder.entry.images | holder.entry.videos for pair in pairs for holder in pair}
    videos = set().union(*(holder.entry.videos for holder in images))
    paths = sorted(set().union(*images.values()))
    groups = _groups([path for path in paths if path not in videos], store, digests) + _copies(videos, digests)
    found = []
    for train, held in pairs:
        for members in groups:
            trained = [path for path in members if path in images[train]]
            evaluated = [path for path in members if path in images[held]]
            if trained and evaluated:
                found.append((train, f"{train.named(trained[0])} ~ {held.named(evaluated[0])}"))
    return found, len(paths)


def _copies(videos: set[Path], digests: FileDigests) -> list[list[Path]]:
    """Group videos by their bytes: one that was encoded again counts as another."""
    members: dict[str, list[Path]] = {}
    for path in sorted(videos):
        members.setdefault(digests.of(path), []).append(path)
    return list(members.values())


def _groups(paths: list[Path], store: QualityStore | None, digests: FileDigests) -> list[list[Path]]:
    """Group files by what they show; one that cannot be decoded only matches its own copies."""
    measured = measure_files(paths, OWN_FILES, store, digests) if paths else []
    whole = [number for number, image in enumerate(measured) if image.defect is None]
    hashes = np.array([measured[number].phash_64 for number in whole], np.uint64)
    colors = np.array([measured[number].colors for number in whole], np.uint8).reshape(len(whole), 48)
    limits = QualitySpec()
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


def stages_of(manifest: Mapping[str, Any], root: Path) -> list[Stage]:
    """The stages of a finished run's or a release's model, the first one first, its own last."""
    return [
        Stage(
            recipe=stage["recipe"],
            fingerprint=stage["fingerprint"],
            data_dir=root / stage["dataset_dir"],
            entries=stage["entries"],
            media_dir=root / stage["media_dir"] if "media_dir" in stage else None,
        )
        for stage in manifest.get("stages", [])
    ]


def earlier_stages(model_dir: Path, adapters: Sequence[Path], root: Path) -> list[Stage]:
    """The stages of a model and of the adapters on it, each run once."""
    stages = [stage for path in (model_dir, *adapters) for stage in training_lineage(path, root)]
    return list({(stage.recipe, stage.fingerprint): stage for stage in stages}.values())


def training_lineage(model_dir: Path, root: Path) -> list[Stage]:
    """The stages that a model directory went through; none for a pretrained or separately copied model."""
    for owner in (model_dir.resolve(), model_dir.resolve().parent):
        if is_complete(owner) and (stages := stages_of(read_manifest(owner), root)):
            return stages
    return []
