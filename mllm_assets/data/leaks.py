"""Whether a model is evaluated on pictures that it, or a stage before it, trained on, from the files on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mllm_assets.artifacts import is_complete, read_manifest
from mllm_assets.data.checks import (
    MAX_EXAMPLES,
    CheckOutcome,
    counts_add_up,
    every_image_has_a_placeholder,
    splits_share_no_image,
)
from mllm_assets.data.dataset_info import entry_file, load_entry
from mllm_assets.data.shared_pictures import Holder, find_shared
from mllm_assets.data.sharegpt import entry_digest, load_rows
from mllm_assets.data.spec import QualitySpec
from mllm_assets.data.stages import Stage
from mllm_assets.errors import DataError, MllmAssetsError
from mllm_assets.quality.store import QualityStore


def datasets_share_no_image(
    data_dir: Path,
    train_entries: Sequence[str],
    eval_entries: Sequence[str],
    limits: QualitySpec | None = None,
    store: QualityStore | None = None,
    stages: Sequence[Stage] = (),
) -> CheckOutcome:
    """No picture of a training entry, nor a near-duplicate, is in an evaluation entry of another dataset.

    Entries of one dataset are left out: `splits_share_no_image` has looked at them, by the dataset's own limits. What
    the model was trained on before counts as well, as the entries are now; one that is gone is named.

    Args:
        data_dir: LLaMA-Factory's `dataset_dir`.
        train_entries: What the recipe trains on.
        eval_entries: What it is evaluated on.
        limits: What counts as a near-duplicate; the defaults if None.
        store: Knows the measurements of bytes that were decoded before.
        stages: Those that the model went through before this recipe.

    Raises:
        DataError: An entry's file or rows are wrong; names them.
    """
    evaluated = [Holder(data_dir, entry, entry) for entry in eval_entries]
    earlier, gone = _earlier(stages) if evaluated else ([], [])
    own = [Holder(data_dir, entry, entry) for entry in train_entries]
    # nobody looked at an entry that one stage trains on and the next evaluates on
    pairs = [(train, held) for train in own for held in evaluated if _origin(train) != _origin(held)]
    pairs += [
        (train, held)
        for train in earlier
        for held in evaluated
        if _origin(train) != _origin(held) or train.entry == held.entry
    ]
    found, num_images = find_shared(pairs, limits or QualitySpec(), store)
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


def _earlier(stages: Sequence[Stage]) -> tuple[list[Holder], list[str]]:
    """What earlier stages trained on, and what of it cannot be read any more."""
    holders, gone = [], []
    for stage in stages:
        for entry in stage.entries:
            holder = Holder(stage.data_dir, entry, f"{entry}, which {stage.title} trained on,")
            try:
                load_rows(stage.data_dir, entry)
            except MllmAssetsError:
                gone.append(f"{entry} of {stage.title}")
            else:
                holders.append(holder)
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
    data_dir: Path,
    train_entries: Sequence[str],
    eval_entries: Sequence[str],
    trained_digests: Mapping[str, str],
    evaluated_digests: Mapping[str, str],
    store: QualityStore | None = None,
    stages: Sequence[Stage] = (),
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
        stages: Those that the model went through before it was trained on `train_entries`.

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
    found += [
        f"{name} is not what {stage.title} was trained on any more, so nothing shows that this stage was not trained "
        f"on what the model is evaluated on: materialise the checkpoint of {stage.recipe}, then this one, again."
        for stage in stages
        for name, digest in stage.entries.items()
        if digest != _digest_now(stage.data_dir, name)
    ]
    found += [f"{name} is both trained on and evaluated on." for name in eval_entries if name in train_entries]
    earlier, _ = _earlier(stages)
    trained = {_version(data_dir, name) for name in train_entries}
    trained |= {_version(holder.data_dir, holder.entry) for holder in earlier}
    shared = trained & {_version(data_dir, name) for name in eval_entries}
    for folder in sorted(folder for folder in shared if folder is not None):
        outcome = splits_share_no_image(folder, data_dir, store=store)
        found += [] if outcome.passed else [outcome.description]
    apart = datasets_share_no_image(data_dir, train_entries, eval_entries, store=store, stages=stages)
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


def _origin(holder: Holder) -> str:
    """What an entry belongs to: the version of a dataset made here, or itself where a person wrote it."""
    folder = _version(holder.data_dir, holder.entry)
    return f"entry {holder.entry} of {holder.data_dir}" if folder is None else str(folder)


def _digest_now(data_dir: Path, entry: str) -> str | None:
    """None of an entry that is gone or cannot be read any more."""
    try:
        return entry_digest(data_dir, entry)
    except MllmAssetsError:
        return None
