"""What a process reads: the digest of each file, and whether it is still the same before something is named by it."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mllm_assets.artifacts import sha256_file
from mllm_assets.disk import link_or_copy
from mllm_assets.errors import IntegrityError

MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class _Known:
    """A file's digest when it was first used, and its present one with the state in which it has that."""

    first: str
    now: str
    state: tuple[int, int]


class FileDigests:
    """sha256 of files: each is read once, and again only where something touched it since."""

    def __init__(self) -> None:
        self._known: dict[Path, _Known] = {}
        self._unread: set[Path] = set()  # whose recorded digest is used
        self._watched: dict[Path, os.stat_result] = {}

    def of(self, path: Path) -> str:
        """The digest of a file's present content; raises OSError if it is missing."""
        state = state_of(path.stat())
        known = self._known.get(path)
        if known is None or known.state != state:
            found = sha256_file(path)
            known = self._known[path] = _Known(known.first if known else found, found, state)
            self._unread.discard(path)
        return known.now

    def take(self, path: Path, digest: str) -> str:
        """Use a recorded digest instead of reading the file, as long as the file is not changed from now on."""
        if path not in self._known:
            self._known[path] = _Known(digest, digest, state_of(path.stat()))
            self._unread.add(path)
        return digest

    def watch(self, paths: Iterable[Path]) -> None:
        """Files that nobody may touch from now on, of which no digest is needed, such as weights that are mapped."""
        self._watched |= {path: path.stat() for path in paths}

    def link(self, source: Path, target: Path) -> str:
        """Put a file into a second place, see `link_or_copy`, and return its digest: it is not read again for that.

        A second name alters the file's time of change, and nothing else of it.
        """
        digest, before = self.of(source), source.stat()
        link_or_copy(source, target)
        if state_of(before) == self._known[source].state and not _was_written(before, source.stat()):
            self._known[source] = replace(self._known[source], state=state_of(source.stat()))
        return digest

    def states(self, folder: Path = Path("/")) -> dict[str, tuple[str, int, int]]:
        """What was read below a folder, by path, for another process of this machine: digest, inode, time of change."""
        read = self._known.keys() - self._unread
        found = {path: self._known[path] for path in sorted(read) if path.is_relative_to(folder)}
        return {str(path): (known.now, *known.state) for path, known in found.items()}

    def take_untouched(self, states: Mapping[str, tuple[str, int, int]]) -> None:
        """Use the digests of another process's `states` for files that nothing touched since it read them."""
        for name, (digest, *state) in states.items():
            path = Path(name)
            if path.is_file() and state_of(path.stat()) == tuple(state):
                self._known.setdefault(path, _Known(digest, digest, state_of(path.stat())))

    def require_unchanged(self, paths: Iterable[Path] | None = None) -> None:
        """Refuse files that are no longer what they were when their digest was first asked for; all by default.

        Only what was touched is read again: a file's time of change (ctime) is the kernel's, and nobody can set it.

        Raises:
            IntegrityError: Names them, with both digests.
        """
        changed = [
            f"{path} (written since)"
            for path, state in (self._watched.items() if paths is None else ())
            if not path.is_file() or _was_written(state, path.stat())
        ]
        for path in list(self._known) if paths is None else paths:
            try:
                found = self.of(path)
            except OSError:
                found = "no file"
            first = self._known[path].first if path in self._known else "a file"
            if found != first:
                changed.append(f"{path} (expected digest {first[:12]}, found {found[:12]})")
        if changed:
            more = f" and {len(changed) - MAX_NAMED} more" if len(changed) > MAX_NAMED else ""
            raise IntegrityError(
                f"What was being read changed meanwhile: {', '.join(changed[:MAX_NAMED])}{more}. Nothing is published "
                f"that was made of it. Put back what was there and start again: what was saved before is used."
            )


_of_earlier_steps: dict[str, tuple[str, int, int]] = {}


def remember(states: Mapping[str, tuple[str, int, int]]) -> None:
    """Keep for this process's next steps what one of them, or its worker, read: see `FileDigests.states`."""
    _of_earlier_steps.update(states)


def remembered(folder: Path) -> dict[str, tuple[str, int, int]]:
    """What earlier steps of this process read of a folder."""
    return {name: state for name, state in list(_of_earlier_steps.items()) if Path(name).is_relative_to(folder)}


def state_of(found: os.stat_result) -> tuple[int, int]:
    """Differs after every write and replacement of a file, whatever its size and time of modification are set to."""
    return found.st_ino, found.st_ctime_ns


def _was_written(before: os.stat_result, now: os.stat_result) -> bool:
    """Whether a file is another one or was written into, and has not just got a name, or lost one.

    Other runs link the weights of a model that is being read, and `gc` deletes such names.
    """
    if state_of(before) == state_of(now):
        return False
    same = all(getattr(before, what) == getattr(now, what) for what in ("st_ino", "st_size", "st_mtime_ns"))
    return not same or before.st_nlink == now.st_nlink
