"""Batches made in processes of their own, ahead of who takes them: pictures are decoded while a model computes."""

import ctypes
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import active_children
from multiprocessing.sharedctypes import RawArray
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset, get_worker_info

from mllm_assets.errors import MachineError, MllmAssetsError
from mllm_assets.training.encoding.collate import Collator

K = TypeVar("K")
T = TypeVar("T")
NOTE_BYTES = 512
DEATH_S = 10  # at most between a process's last words and its end


def loaded(
    jobs: Iterable[K],
    make: Callable[[K], T],
    *,
    num_workers: int,
    collators: Sequence[Collator] = (),
    pin_memory: bool = False,
) -> Iterator[tuple[K, T]]:
    """Yield each job with what `make` gives for it, in the jobs' order.

    Args:
        jobs: Asked for shortly before they are due, so that they may depend on what came before.
        make: Runs in one of `num_workers` processes, which are kept to the end; in this one with 0.
        num_workers: How many processes.
        collators: Those that `make` calls, which say at which row they are.
        pin_memory: Whether tensors are put where a GPU takes them from.

    Raises:
        MllmAssetsError: What `make` raised.
        MachineError: A process died. Names the row that it was at.
    """
    if not num_workers:
        yield from ((job, make(job)) for job in jobs)
        return
    places = _Places(num_workers)
    for collator in collators:
        collator.note_row = places.note
    loader = DataLoader(
        _Work(make),
        batch_size=None,
        sampler=jobs,  # pyright: ignore[reportArgumentType]
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
    )
    made = iter(loader)
    while True:
        try:
            job, value = next(made)
        except StopIteration:
            return
        except (RuntimeError, EOFError, ConnectionError) as error:  # the last two where it died while handing over
            row_id = places.row_of_dead(str(error)) if isinstance(error, RuntimeError) else places.row_of_dying()
            if row_id is None:
                raise
            raise MachineError(
                f"A process that decodes pictures was killed{row_id and f' at row {row_id}'}. Where memory ran out "
                "(/dev/shm too, of which a container has little), set a lower dataloader_num_workers; otherwise look "
                "at the row's pictures."
            ) from error
        if isinstance(value, MllmAssetsError):
            raise value
        yield job, value


class _Work(Dataset[tuple[K, Any]], Generic[K]):
    """What a loader process does with a job; an error of the user's comes back as it is."""

    def __init__(self, make: Callable[[K], Any]) -> None:
        self._make = make

    def __getitem__(self, job: K) -> tuple[K, Any]:
        try:
            return job, self._make(job)
        except MllmAssetsError as error:
            return job, error


class _Places:
    """At which row each loader process is, in memory that outlives it."""

    def __init__(self, num_workers: int) -> None:
        self._notes: Any = [RawArray(ctypes.c_char, NOTE_BYTES) for _ in range(num_workers)]

    def note(self, row_id: str) -> None:
        """Say that this process is at a row."""
        if worker := get_worker_info():
            self._notes[worker.id].value = f"{os.getpid()} {row_id}".encode()[: NOTE_BYTES - 1]

    def row_of_dead(self, message: str) -> str | None:
        """Return the row of the process whose end PyTorch's message is about; "" where it had not begun with one."""
        found = re.search(r"DataLoader worker \(pid(?:\(s\))? (\d+)", message)
        if found is None:
            return None
        return self._rows().get(found[1], "")

    def row_of_dying(self) -> str | None:
        """Wait for the end of the process that cannot be asked any more, and return its row."""
        deadline_s = time.monotonic() + DEATH_S
        while time.monotonic() < deadline_s:
            with suppress(RuntimeError):  # by which PyTorch tells of the same end, wherever this process is
                alive = {str(child.pid) for child in active_children()}
                for pid, row_id in self._rows().items():
                    if pid and pid not in alive:
                        return row_id
                time.sleep(0.02)
        return None

    def _rows(self) -> dict[str, str]:
        """The row of each process by its pid; "" is that of those that have not begun with one."""
        return dict(note.value.decode(errors="replace").partition(" ")[::2] for note in self._notes)


def _unchanged(value: T) -> T:
    return value
