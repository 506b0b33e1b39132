"""The checkpoints of a run that is not finished, mirrored as they are written: another machine can go on with it.

Pointers say which a run has, their files, and the run's settings: unlike an artefact, a checkpoint of the same step may
be written again, by an attempt that began before it.
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mllm_assets.artifacts import find_damage, is_complete, staged_directory, write_json_atomic
from mllm_assets.errors import IntegrityError, MllmAssetsError
from mllm_assets.store.mirror import Mirror
from mllm_assets.store.objects import described
from mllm_assets.training.runs.run_file import RUN_FILE, STARTS_FROM, read_run_file

LOOK_EVERY_S = 2.0
_NAME = re.compile(r"checkpoint-(\d+)")


@contextmanager
def checkpoints_sent(mirror: Mirror, run_dir: Path, warn: Callable[[str], object]) -> Iterator[None]:
    """Send each checkpoint of a run soon after it is written, and those that are left at the end of the block.

    A store that cannot be reached does not end the training: `warn` is told, and the next checkpoint is tried again.
    """
    ended = threading.Event()

    def repeat() -> None:
        sent: dict[str, int] = {}
        is_last = False
        while not is_last:
            is_last = ended.wait(LOOK_EVERY_S)
            try:
                there = {path.name: path.stat().st_ino for path in _complete(run_dir)}
                if there.keys() - sent.keys() or any(sent[name] != number for name, number in there.items()):
                    send_checkpoints(mirror, run_dir)
                    sent = there
            except FileNotFoundError:
                continue  # the trainer deleted an older one meanwhile
            except MllmAssetsError as error:
                warn(f"The checkpoints of {run_dir} are not all in the artefact store: {error}")

    thread = threading.Thread(target=repeat, name="checkpoints", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def send_checkpoints(mirror: Mirror, run_dir: Path) -> None:
    """Send all checkpoints that a run has now; raises as `Store.push`."""
    names = []
    for path in _complete(run_dir):
        files = described(path)
        mirror.store.push_files({entry["sha256"]: path / name for name, entry in files.items()})
        mirror.store.point(f"{_pointer(mirror, run_dir)}/{path.name}", {"files": files})
        names.append(path.name)
    if names:
        kept = {name: value for name, value in read_run_file(run_dir).items() if name != STARTS_FROM}
        mirror.store.point(_pointer(mirror, run_dir), {"names": names, "run": kept})


def fetch_checkpoints(mirror: Mirror, run_dir: Path) -> list[str]:
    """Fetch the checkpoints that the store has of a run, where its newest is newer than ours; returns their names.

    Raises:
        IntegrityError: What is there is not what was sent.
        SourceError: The store cannot be reached, or refuses.
    """
    value = mirror.store.pointer(_pointer(mirror, run_dir))
    names = [] if value is None else [name for name in map(str, value["names"]) if _NAME.fullmatch(name)]
    there, here = sorted(map(_step, names)), [_step(path.name) for path in _complete(run_dir)]
    if value is None or max(there, default=0) <= max(here, default=0):
        return []
    run_dir.mkdir(parents=True, exist_ok=True)
    if not (run_dir / RUN_FILE).exists():
        write_json_atomic(run_dir / RUN_FILE, dict(value["run"]))
    missing = [name for step in there if not is_complete(run_dir / (name := f"checkpoint-{step}"))]
    for name in missing:
        _fetch(mirror, run_dir, name)
    mirror.notify(f"{', '.join(missing)} of {mirror.layout.relative(run_dir)} came from {mirror.store.url}.")
    return missing


def _fetch(mirror: Mirror, run_dir: Path, name: str) -> None:
    pointer = f"{_pointer(mirror, run_dir)}/{name}"
    value = mirror.store.pointer(pointer)
    files = {} if value is None else value["files"]
    with staged_directory(run_dir / name) as staging:
        sizes = {staging / file: entry["num_bytes"] for file, entry in files.items()}
        mirror.store.fetch_files({staging / file: entry["sha256"] for file, entry in files.items()}, sizes)
        if not is_complete(staging) or described(staging) != files or find_damage(staging, deep=False):
            raise IntegrityError(
                f"{name} of {mirror.store.url} is not what its own manifest says. Delete pointers/{pointer}.json and "
                f"pointers/{_pointer(mirror, run_dir)}.json there, and run again: the run begins anew on this machine."
            )


def _complete(run_dir: Path) -> list[Path]:
    found = [path for path in run_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=lambda path: _step(path.name))


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])


def _pointer(mirror: Mirror, run_dir: Path) -> str:
    return f"checkpoints/{mirror.layout.relative(run_dir)}"
