"""Delete what can be made again and nothing names any more: `mllm-assets gc`, dry unless it is told to delete.

Not touched: releases, models in `pretrains/`, DuckDB, and whatever is younger than the policy says, so that what is
being made now is safe before anything names it. While a run is in progress, data and caches stay altogether.
"""

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mllm_assets.errors import MllmAssetsError
from mllm_assets.layout import Layout
from mllm_assets.operations.artefacts import (
    DATA_AND_CACHES,
    RUN,
    find_artefacts,
    find_kept,
    is_held,
    is_in_use,
    lock_of,
)
from mllm_assets.operations.unnamed_images import find_unnamed_images
from mllm_assets.tables import print_table

DAY_S = 86400.0
MIB = 2**20
STAGING = re.compile(r"\.(?:.+\.)?[0-9a-f]{8}\.tmp")  # of a folder, or of one file; see `mllm_assets.artifacts`
STAGING_PLACES = (
    "outputs/*", "outputs/*/*", "data", "data/images", "data/.*/*", "cache/*/*", "releases", "releases/*", "pretrains"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What may go.

    Attributes:
        keep_runs: So many finished runs of each recipe stay, the newest.
        older_than_s: Nothing that was written or used within so many seconds goes.
    """

    keep_runs: int = 3
    older_than_s: float = 14 * DAY_S


@dataclass(frozen=True, slots=True)
class Garbage:
    """One file or directory that can go; `used_s` is the Unix time at which it was last used."""

    kind: str
    path: Path
    num_bytes: int
    used_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What can go, and notes on what was not looked at."""

    garbage: list[Garbage]
    notes: list[str]


def find_garbage(layout: Layout, policy: Policy, *, also_named: str = "", in_progress: str | None = None) -> Plan:
    """Say what can go.

    Args:
        layout: The root.
        policy: What may.
        also_named: Text that names artefacts: Dagster's latest materialisations, the project's YAML.
        in_progress: A run that is in progress, where the caller knows of one.
    """
    now_s = time.time()
    artefacts = find_artefacts(layout)
    kept = find_kept(layout, artefacts, keep_runs=policy.keep_runs, also_named=also_named)
    busy = [a.path for a in artefacts if a.kind == RUN and is_in_use(a.path)]
    in_progress = in_progress or (f"training in {layout.relative(busy[0])}" if busy else None)
    notes = [f"{in_progress} is in progress, so data and caches stay"] if in_progress else []
    garbage = []
    for artefact in artefacts:
        used_s = artefact.used_s
        if artefact.path in kept or artefact.path in busy or now_s - used_s < policy.older_than_s:
            continue
        if in_progress and artefact.kind in DATA_AND_CACHES:
            continue
        garbage.append(Garbage(artefact.kind, artefact.path, num_bytes(artefact.path), used_s, _reason(artefact.kind)))
    if not in_progress:
        try:
            garbage += _images(layout, policy, {item.path for item in garbage}, now_s)
        except MllmAssetsError as error:
            notes.append(f"images stay: {error}")
    garbage += _leftovers(layout, policy, now_s)
    return Plan(garbage, notes)


def _reason(kind: str) -> str:
    if kind == RUN:
        return "nothing names it, and it is not among the newest"
    return "not used since" if kind in ("features", "hidden states") else "nothing that is kept names it"


def _images(layout: Layout, policy: Policy, gone: set[Path], now_s: float) -> Iterator[Garbage]:
    for path in find_unnamed_images(layout, gone):
        used_s = _file_used_s(path)
        if now_s - used_s >= policy.older_than_s:
            yield Garbage("image", path, path.stat().st_size, used_s, "no dataset names it")


def _leftovers(layout: Layout, policy: Policy, now_s: float) -> Iterator[Garbage]:
    """What a killed process had begun: hidden folders and files beside their places, downloads, jobs."""
    found = [
        path
        for place in STAGING_PLACES
        for folder in layout.root.glob(place)
        if folder.is_dir() and not folder.is_symlink()
        for path in folder.iterdir()
        if STAGING.fullmatch(path.name)
    ]
    found += layout.pretrains.glob(".*.download")
    found += layout.ray_jobs.glob("*")
    found += layout.root.glob(".tmp_dagster_home_*")
    for path in dict.fromkeys(found):
        try:
            files = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
            used_s = max(file.lstat().st_mtime for file in files)
        except FileNotFoundError:  # its owner has finished it meanwhile
            continue
        if now_s - used_s >= policy.older_than_s and not is_held(path.with_suffix(".lock")):  # its owner's, beside it
            yield Garbage("leftover", path, num_bytes(path), used_s, "half done, and whoever began it is gone")


def delete(plan: Plan) -> list[Garbage]:
    """Delete what was found and is still as old as it was; return what was deleted.

    A directory is renamed first, so that a reader never sees half of it; a run's goes under its lock.
    """
    return [item for item in plan.garbage if _delete_one(item)]


def _delete_one(item: Garbage) -> bool:
    if item.kind != RUN:
        return _remove(item)
    try:
        with FileLock(lock_of(item.path)).acquire(blocking=False):
            removed = _remove(item)
            if removed:
                lock_of(item.path).unlink(missing_ok=True)
            return removed
    except Timeout:  # somebody has begun to train there
        return False


def _remove(item: Garbage) -> bool:
    try:
        used_s = _file_used_s(item.path) if item.kind == "image" else item.path.lstat().st_mtime
        if used_s > item.used_s:  # used since it was found
            return False
        if item.path.is_symlink() or not item.path.is_dir():
            item.path.unlink()
            return True
        hidden = item.path.with_name(f".{uuid.uuid4().hex[:8]}.tmp")  # swept by whoever writes there next, if need be
        item.path.rename(hidden)
    except FileNotFoundError:  # gone meanwhile
        return False
    shutil.rmtree(hidden)
    return True


def _file_used_s(path: Path) -> float:
    """When an image was written, or found in its place by a split that names it."""
    return max(path.stat().st_mtime, path.stat().st_ctime)


def _days(used_s: float) -> str:
    return f"{(time.time() - used_s) / DAY_S:.0f}"


def num_bytes(path: Path) -> int:
    """What a file or a directory takes, links not followed."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    return sum(file.lstat().st_size for file in files)


def print_plan(layout: Layout, plan: Plan, *, deleted: Sequence[Garbage] | None) -> None:
    """Print a table, images and shards by kind, and what it comes to; `deleted` is None where nothing was."""
    shown = plan.garbage if deleted is None else list(deleted)
    rows = [
        [item.kind, layout.relative(item.path), f"{item.num_bytes / MIB:.1f}", _days(item.used_s), item.reason]
        for item in shown
        if item.kind != "image"
    ]
    if images := [item for item in shown if item.kind == "image"]:
        size = f"{sum(item.num_bytes for item in images) / MIB:.1f}"
        days = _days(max(item.used_s for item in images))
        rows.append(["images", f"{len(images)} in data/images", size, days, images[0].reason])
    if rows:
        print_table(
            ["what", "path", "MiB", "days", "why it can go"], rows, numbers=["MiB", "days"], prose=["why it can go"]
        )
    for note in plan.notes:
        print(note)
    total = f"{sum(item.num_bytes for item in shown) / MIB:.1f} MiB in {len(shown)} places"
    if deleted is not None:
        print(f"deleted {total}")
    else:
        print(f"{total} can go; nothing was deleted" + (" (--delete does it)" if shown else ""))
