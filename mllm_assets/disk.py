"""The disk: what is said wherever a write may fill it, and files that take no space of their own."""

import errno
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mllm_assets.errors import MachineError

FICLONE = 0x40049409  # of linux/fs.h
NO_SPACE = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
CURE = (
    "Free some space (`mllm-assets gc` lists what can go), or set MLLM_ASSETS_ROOT to a folder on a larger disk; then "
    "run again."
)
TRAINING_CURE = (
    "What was saved before it is untouched. Free some space, or set save_total_limit: 1 in the recipe, which keeps the "
    "newest checkpoint only; then run again: it resumes."
)


@dataclass
class Outcome:
    """What a write that fails leaves, in a sentence; whoever writes changes it as it goes on."""

    text: str = "Nothing half-written is kept."


@contextmanager
def full_disk_is_an_error(directory: Path) -> Iterator[Outcome]:
    """Turn a write that fails because the disk is full into a message about it.

    Raises:
        MachineError: The disk of `directory` is full. Says what is free, what can go, and what became of the write.
    """
    free_bytes, outcome = free_on(directory), Outcome()
    try:
        yield outcome
    except Exception as error:  # Arrow and DuckDB have classes of their own
        if isinstance(error, MachineError) or not is_full_disk(error):
            raise
        now = f"{size_text(free_on(directory))} are free now"
        raise MachineError(
            f"The disk is full: what is written to {directory} needs more than the {size_text(free_bytes)} that were "
            f"free, or than a quota allows; {now}. {outcome.text} {CURE}"
        ) from error


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised for, says that there is no space left."""
    while error is not None:
        if getattr(error, "errno", None) in NO_SPACE or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def no_space_is_an_error(directory: Path, what: str, num_bytes: int, *, cure: str = TRAINING_CURE) -> Iterator[None]:
    """Turn a failed write into a message about the disk, if the disk is the reason.

    Writers in torch and safetensors raise errors of their own without an errno, so a failure is followed by a test
    whether the disk takes `num_bytes`. Free space is read before: half of a file may have filled the disk since.

    Raises:
        MachineError: The disk is full. What was there before is kept.
    """
    free_bytes = free_on(directory.parent)
    try:
        yield
    except Exception as error:  # torch and safetensors have classes of their own
        if isinstance(error, MachineError) or not (is_full_disk(error) or _lacks_space(directory, num_bytes)):
            raise
        free = f"{size_text(free_bytes)} were free"
        if free_bytes > num_bytes:
            free += ": a quota or a limit of file sizes allows less"
        raise MachineError(
            f"The disk is full: {what} needs about {size_text(num_bytes)} in {directory.parent}, and {free} ({error}). "
            f"{cure}"
        ) from error


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Refuse a download that the disk has no space for; `folder` need not exist.

    Raises:
        MachineError: Names the folder, what is needed and what is free.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = free_on(there)
    if num_bytes > free:
        raise MachineError(
            f"{what} needs {size_text(num_bytes)} more in {there}, but only {size_text(free)} are free there. Free "
            f"{size_text(num_bytes - free)} (mllm-assets gc lists what can go), or set MLLM_ASSETS_ROOT to a folder on "
            "a larger disk."
        )


def _lacks_space(directory: Path, num_bytes: int) -> bool:
    place = directory if directory.is_dir() else directory.parent
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            os.posix_fallocate(probe.fileno(), 0, max(1, num_bytes))
    except OSError as error:
        return error.errno in NO_SPACE
    return False


def free_on(directory: Path) -> int:
    """Free bytes of the disk that a folder is on, or will be."""
    return shutil.disk_usage(next(path for path in (directory, *directory.absolute().parents) if path.exists())).free


def size_text(num_bytes: int) -> str:
    """A size in words: "1.2 GiB", "3.4 MiB", "56 KiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**10:.0f} KiB"


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file that nothing writes into a second place that takes no space, or copy it where that cannot be.

    A clone where the file system has them (btrfs, XFS): what is written into one is not in the other. Else a second
    name of the same file.
    """
    source = source.resolve()
    if _clone(source, target):
        return
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _clone(source: Path, target: Path) -> bool:
    if sys.platform != "linux":
        return False
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
            return True
        except OSError:  # other file systems have none, and none goes from one to another
            target.unlink()
            return False
