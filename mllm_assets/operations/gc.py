"""Delete what can be made again and nothing refers to: `mllm-assets gc`, a dry run unless `--delete` is given.

Not touched: releases, models in `pretrains/`, DuckDB, and whatever is younger than the policy says, so that what is
being made now is safe before anything names it. While a run is in progress, all data and caches stay.
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

from mllm_assets.artifacts import is_locked, lock_path
from mllm_assets.errors import MllmAssetsError
from mllm_assets.layout import Layout
from mllm_assets.operations.artefacts import (
    CACHES,
    DATA_AND_CACHES,
    RUN,
    find_artefacts,
    find_kept,
    find_unnamed_images,
    last_used_s,
    media_dirs,
)
from mllm_assets.tables import print_table

DAY_S = 86400.0
IMAGE, LEFTOVER = "image", "leftover"
MIB = 2**20
REASONS = {RUN: "nothing names it, and it is not among the newest", **dict.fromkeys(CACHES, "not used since")}
STAGING = re.compile(r"\.(?:.+\.)?[0-9a-f]{8}\.tmp(?:\.wal)?")  # of a folder or a file; see `mllm_assets.artifacts`
STAGING_PLACES = (
    "outputs/*", "outputs/*/*", "data", "data/images", "data/.*/*", "cache/*/*", "releases", "releases/*", "pretrains"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What may go."""

    keep_runs: int = 3  # so many finished runs of each recipe stay, the newest
    older_than_s: float = 14 * DAY_S  # what was written or used within so many seconds stays


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
    """What can be deleted, and notes on what was not checked."""

    garbage: list[Garbage]
    notes: list[str]


def find_garbage(layout: Layout, policy: Policy, *, also_named: str = "", in_progress: str | None = None) -> Plan:
    """Find what can go; `also_named` as in `find_kept`, `in_progress` is a run of Dagster's that is in progress."""
    now_s = time.time()
    artefacts = find_artefacts(layout)
    kept = find_kept(layout, artefacts, keep_runs=policy.keep_runs, also_named=also_named)
    busy = [a.path for a in artefacts if a.kind == RUN and is_locked(lock_path(a.path))]  # something trains there
    in_progress = in_progress or (f"training in {layout.relative(busy[0])}" if busy else None)
    notes = [f"{in_progress} is in progress, so data and caches stay"] if in_progress else []
    garbage = []
    for artefact in artefacts:
        used_s = artefact.used_s
        if artefact.path in kept or artefact.path in busy or now_s - used_s < policy.older_than_s:
            continue
        if in_progress and artefact.kind in DATA_AND_CACHES:
            continue
        reason = REASONS.get(artefact.kind, "nothing that is kept names it")
        garbage.append(Garbage(artefact.kind, artefact.path, num_bytes(artefact.path), used_s, reason))
    if not in_progress:
        try:
            gone, media = {item.path for item in garbage}, media_dirs(layout, also_named)
            garbage += _images(policy, find_unnamed_images(layout, gone, media), now_s)
        except MllmAssetsError as error:
            notes.append(f"images stay: {error}")
    garbage += _leftovers(layout, policy, now_s)
    return Plan(garbage, notes)


def _images(policy: Policy, unnamed: Iterator[Path], now_s: float) -> Iterator[Garbage]:
    for path in unnamed:
        used_s = _used_s(IMAGE, path)
        if now_s - used_s >= policy.older_than_s:
            yield Garbage(IMAGE, path, path.stat().st_size, used_s, "no dataset names it")


def _leftovers(layout: Layout, policy: Policy, now_s: float) -> Iterator[Garbage]:
    """What killed processes left: staging folders and files, downloads, jobs."""
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
    found += layout.data.glob(f"{layout.quality_db.name}.tmp")  # what DuckDB had no memory for; its lock is beside it
    for path in dict.fromkeys(found):
        try:
            used_s = _used_s(LEFTOVER, path)
        except FileNotFoundError:  # its owner has finished it meanwhile
            continue
        if now_s - used_s >= policy.older_than_s and not is_locked(path.with_suffix(".lock")):  # its owner's
            yield Garbage(LEFTOVER, path, num_bytes(path), used_s, "unfinished, and the process that made it has ended")


def delete(plan: Plan) -> list[Garbage]:
    """Delete what was found and is still as old as it was; return what was deleted."""
    return [item for item in plan.garbage if (_delete_run(item) if item.kind == RUN else _delete(item))]


def _delete_run(item: Garbage) -> bool:
    try:
        with FileLock(lock := lock_path(item.path)).acquire(blocking=False):
            if deleted := _delete(item):
                lock.unlink(missing_ok=True)
            return deleted
    except Timeout:  # a training has begun there
        return False


def _delete(item: Garbage) -> bool:
    """Delete one; a directory is renamed first, so that a reader never sees half of it."""
    try:
        if _used_s(item.kind, item.path) != item.used_s:  # used since it was found; the clock may have been set back
            return False
        if item.path.is_symlink() or not item.path.is_dir():
            item.path.unlink()
            return True
        hidden = item.path.with_name(f".{uuid.uuid4().hex[:8]}.tmp")  # swept by the next writer, if need be
        item.path.rename(hidden)
    except FileNotFoundError:  # deleted meanwhile
        return False
    shutil.rmtree(hidden)
    return True


def _used_s(kind: str, path: Path) -> float:
    """When it was written or used; a split that finds an image in its place uses it."""
    if kind == IMAGE:
        return max(path.stat().st_mtime, path.stat().st_ctime)
    if kind == LEFTOVER:
        files = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
        return max(file.lstat().st_mtime for file in files)
    return last_used_s(path)


def _days(used_s: float) -> str:
    return f"{max(0.0, time.time() - used_s) / DAY_S:.0f}"


def num_bytes(path: Path) -> int:
    """What a file or a directory takes, links not followed."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    return sum(file.lstat().st_size for file in files)


def print_plan(layout: Layout, plan: Plan, *, deleted: Sequence[Garbage] | None) -> None:
    """Print a table, with all images in one row, and the total; `deleted` is None for a dry run."""
    shown = plan.garbage if deleted is None else list(deleted)
    rows = [
        [item.kind, layout.relative(item.path), f"{item.num_bytes / MIB:.1f}", _days(item.used_s), item.reason]
        for item in shown
        if item.kind != IMAGE
    ]
    if images := [item for item in shown if item.kind == IMAGE]:
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
