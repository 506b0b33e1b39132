"""What lies damaged below a root, and its repair: `mllm-assets doctor --repair`.

Nothing is deleted. What can be made again is moved aside, to a name that `mllm-assets gc` deletes in time, so that the
next materialisation makes it; the database is restored from its copy. What only its owner can replace is named.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from mllm_assets.artifacts import (
    MANIFEST,
    UNNAMED,
    find_damage,
    is_complete,
    is_locked,
    lock_path,
    move_aside,
    read_manifest,
    sha256_file,
    slug,
)
from mllm_assets.data.curate.publish import side_files
from mllm_assets.data.curate.register import build_entry, write_entries
from mllm_assets.data.quality.damage import find_database_damage, keep_damaged, restore
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.sharegpt.dataset import IMAGE_LIST, listed_images
from mllm_assets.data.sharegpt.entries import read_dataset_info
from mllm_assets.errors import DataError, IntegrityError
from mllm_assets.layout import Layout
from mllm_assets.operations.artefacts import RUN, Artefact, find_artefacts
from mllm_assets.operations.findings import Finding
from mllm_assets.project.read import materialize_command
from mllm_assets.releases.versions import find_release_damage, released_recipes, version_folders
from mllm_assets.training.runs.models import PUBLISHED
from mllm_assets.training.runs.run_file import RUN_FILE, read_run_file

CHECK = "artefacts"
MAKERS = {
    "source": "raw",
    "measurements": "sample_quality",
    "dataset version": "train",
    "predictions": "predictions",
    "metrics": "eval_metrics",
    RUN: "checkpoint",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """One artefact that is not as it was written.

    Attributes:
        kind: What it is.
        path: Its file or folder.
        wrong: What is wrong with it.
        cure: What to do, after the repair where there is one.
        repair: Repairs it and says what was done; None where only its owner can.
    """

    kind: str
    path: Path
    wrong: str
    cure: str
    repair: Callable[[], str] | None = None


def check_artefacts(layout: Layout) -> Finding:
    """A quick look, at sizes and manifests alone."""
    damages = list(find_damages(layout, deep=False))
    if not damages:
        return Finding(CHECK, "ok", "none lacks a file, or has one of another size")
    first = damages[0]
    also = f", and {len(damages) - 1} more" if len(damages) > 1 else ""
    step = "mllm-assets doctor --repair"
    return Finding(CHECK, "fail", f"{first.kind} {layout.relative(first.path)}: {first.wrong}{also}", step)


def repair(layout: Layout) -> list[Finding]:
    """Compare every byte of what lies below the root with its record, and repair what can be: a finding for each."""
    findings = []
    for damage in find_damages(layout):
        what = f"{layout.relative(damage.path)}: {damage.wrong}"
        if damage.repair is None:
            findings.append(Finding(damage.kind, "fail", what, damage.cure))
        else:
            findings.append(Finding(damage.kind, "warn", f"{what}; {damage.repair()}", damage.cure))
    return findings or [Finding(CHECK, "ok", "each is as it was written")]


def find_damages(layout: Layout, *, deep: bool = True) -> Iterator[Damage]:
    """Everything below the root that is not as it was written; `deep` compares digests, else sizes only."""
    yield from _database(layout) if deep else ()
    yield from _dataset_info(layout)
    for artefact in find_artefacts(layout):
        if artefact.kind == RUN:
            yield from _run(artefact.path, deep=deep)
        elif artefact.kind in MAKERS:
            yield from _derived(artefact, deep=deep)
        else:
            for shard in sorted(artefact.path.glob("[!.]*")):
                yield from _shard(artefact.kind, shard, deep=deep)
    for link in sorted(layout.data.glob("*")):
        if link.is_symlink():
            yield from _images(layout, link, deep=deep)
    for manifest in sorted(layout.pretrains.glob(f"[!.]*/{MANIFEST}")):
        yield from _pretrained(manifest.parent, deep=deep)
    for folder in sorted(layout.data.glob(".history/*/[!.]*")):
        if wrong := _wrong(folder, deep=deep):
            yield Damage(kind="history", path=folder, wrong=wrong, cure="Delete it: the database holds its rows.")
    for recipe in released_recipes(layout):
        for folder in version_folders(layout, recipe):
            if wrong := find_release_damage(folder, deep=deep):
                cure = f"Make a new version: {materialize_command(f'{recipe}/released_model')}"
                yield Damage(kind="release", path=folder, wrong=wrong, cure=cure)


def _wrong(folder: Path, *, deep: bool = True, only: tuple[str, ...] = ()) -> str | None:
    if not is_complete(folder):
        return f"{MANIFEST} is missing"
    try:
        return find_damage(folder, deep=deep, only=only)
    except IntegrityError:
        return f"{MANIFEST} cannot be read"


def _derived(artefact: Artefact, *, deep: bool) -> Iterator[Damage]:
    path = artefact.path
    if wrong := _wrong(path, deep=deep):
        owner = path.parent.name if path.parent.name not in ("predictions", "eval_metrics") else path.parent.parent.name
        cure = f"Make it again: {materialize_command(f'{owner}/{MAKERS[artefact.kind]}')}"
        yield Damage(kind=artefact.kind, path=path, wrong=wrong, cure=cure, repair=lambda: _aside(path))


def _shard(kind: str, path: Path, *, deep: bool) -> Iterator[Damage]:
    if path.is_dir() and (wrong := _wrong(path, deep=deep)):
        cure = "Run what needs it again; a recipe's vision_features, where it has them, first."
        yield Damage(kind=kind, path=path, wrong=wrong, cure=cure, repair=lambda: _aside(path))


def _run(path: Path, *, deep: bool) -> Iterator[Damage]:
    """A run's model is never touched: perhaps nothing that it was trained from is left."""
    if is_locked(lock_path(path)):  # it trains
        return
    for checkpoint in sorted(path.glob("checkpoint-*")):
        if wrong := _wrong(checkpoint, deep=deep):
            cure = "Nothing, or delete it: a run that resumes skips it."
            yield Damage(kind="checkpoint", path=checkpoint, wrong=wrong, cure=cure)
    try:
        read_run_file(path)
    except IntegrityError:
        run_file, again = path / RUN_FILE, materialize_command(f"{path.parent.name}/{MAKERS[RUN]}")
        cure = f"Train its recipe again, which resumes where it is unfinished: {again}"
        yield Damage(kind=RUN, path=run_file, wrong="is damaged", cure=cure, repair=lambda: _aside(run_file))
    if is_complete(path) and (wrong := _wrong(path, deep=deep, only=PUBLISHED)):
        again = materialize_command(f"{path.parent.name}/{MAKERS[RUN]}")
        cure = f"Train its recipe again, which resumes and writes its model again: {again}"
        yield _manifest_or_files(RUN, path, wrong, cure)


def _pretrained(path: Path, *, deep: bool) -> Iterator[Damage]:
    if wrong := _wrong(path, deep=deep):
        again = materialize_command(f"pretrained/{slug(path.name, UNNAMED)}")
        cure = f"Make or fetch it again: {again} (put it there again if you put it there yourself)"
        yield _manifest_or_files("pretrained model", path, wrong, cure)


def _manifest_or_files(kind: str, path: Path, wrong: str, cure: str) -> Damage:
    """A damaged folder; its manifest is moved aside if that is what cannot be read."""
    is_manifest = wrong.startswith(MANIFEST)
    return Damage(
        kind=kind,
        path=path,
        wrong=wrong,
        cure=cure,
        repair=(lambda: _aside(path / MANIFEST)) if is_manifest else None,
    )


def _images(layout: Layout, link: Path, *, deep: bool) -> Iterator[Damage]:
    """What a dataset's link points to, and the pictures that it names."""
    cure = f"Make it again: {materialize_command(f'{link.name}/train')}"
    if not link.exists():
        yield Damage(kind="dataset version", path=link, wrong="what it points to is gone", cure=cure)
    elif _wrong(link, only=(IMAGE_LIST,)) is None and (link / IMAGE_LIST).is_file():
        listed = ((layout.data / name, digest) for name, digest in listed_images(link))
        broken = [path for path, digest in listed if not path.is_file() or (deep and sha256_file(path) != digest)]
        if broken:
            wrong = "it is missing or was changed" + (f", as are {len(broken) - 1} more" if len(broken) > 1 else "")
            yield Damage(kind="image", path=broken[0], wrong=wrong, cure=cure)


def _dataset_info(layout: Layout) -> Iterator[Damage]:
    path = layout.dataset_info
    if not path.exists():
        return
    try:
        read_dataset_info(layout.data)
    except DataError as error:
        wrong = str(error).partition(": ")[2].partition(". ")[0] or str(error)
        cure = "Copy entries that you wrote yourself out of the file that was moved."
        yield Damage(kind="entries", path=path, wrong=wrong, cure=cure, repair=lambda: _entries_again(layout))


def _entries_again(layout: Layout) -> str:
    """Write the entries of all linked datasets; the old file, which may hold entries of the user's, is kept."""
    kept, names = keep_damaged(layout.dataset_info), list[str]()
    for link in sorted(path for path in layout.data.glob("*") if path.is_symlink() and _wrong(path) is None):
        if (manifest := read_manifest(link)).get("kind") != "split":
            continue
        spec = manifest["spec"]
        entries = {
            spec[f"{side}_entry"]: build_entry(f"{link.name}/{path.name}")
            for side, path in side_files(link, spec["output"]["format"]).items()
        }
        write_entries(layout, link.name, entries)
        names += entries
    written = f"written again with {', '.join(names)}" if names else "no dataset here has splits to write entries of"
    return f"moved to {kept.name}; {written}"


def _database(layout: Layout) -> Iterator[Damage]:
    path, snapshot = layout.quality_db, QualityStore(layout.quality_db).snapshot
    if not path.exists() and not snapshot.exists():
        return
    if snapshot.is_dir():
        wrong = "a folder is in the place of the copy of the last write"
        cure = "Nothing: the next write makes it again."
        yield Damage(kind="quality database", path=snapshot, wrong=wrong, cure=cure, repair=lambda: _aside(snapshot))
    with FileLock(f"{path}.lock"):
        wrong = find_database_damage(path)
    if wrong is not None:
        cure = f"Make its rows again: {materialize_command('*/sample_quality')}"
        is_whole = find_database_damage(snapshot) is None
        yield Damage(
            kind="quality database",
            path=path,
            wrong=wrong,
            cure="" if is_whole else cure,
            repair=lambda: _restored(path, snapshot, wrong) if is_whole else _both_kept(path, snapshot),
        )


def _restored(path: Path, snapshot: Path, wrong: str) -> str:
    with FileLock(f"{path}.lock"):
        restore(path, snapshot, wrong)
    return f"restored from the copy that the last write left, {snapshot.name}"


def _both_kept(path: Path, snapshot: Path) -> str:
    with FileLock(f"{path}.lock"):
        kept = [keep_damaged(file).name for file in (path, snapshot) if file.exists()]
    return f"the copy of its last write is missing or damaged too; moved to {' and '.join(kept)}"


def _aside(path: Path) -> str:
    return f"moved to {move_aside(path).name}"
