"""Rows that a model is asked about in batches: made ahead in other processes, and halved where memory ends."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mllm_assets.errors import OutOfMemoryError
from mllm_assets.training.encoding.collate import Collator
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.loader import loaded
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.models.load import with_pixels_as
from mllm_assets.worker.tasks import ROWS_AT_ONCE, WHOLE, Part

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

Batch = dict[str, torch.Tensor]


@dataclass(kw_only=True, slots=True)
class Pass:
    """Rows that a model is asked about in one way.

    Attributes:
        name: Of what is asked.
        rows: In any order.
        collator: Makes a batch of some of them.
        run: Gives a value for each of some rows, from them and their batch; None where it has to be made first.
        size: Most rows at once. It becomes smaller where they do not fit in memory.
        unit: Rows that stay together however many parts share the work; `size` takes several or one.
        is_divisible: Whether other batches give the same values, to rounding. Drawn tokens are other ones.
        known: The values of rows that were asked before, by position: whole units where it is not divisible.
    """

    name: str
    rows: EncodedRows
    collator: Collator
    run: Callable[[Sequence[EncodedRow], Batch | None], Sequence[Any]]
    size: int
    unit: int = ROWS_AT_ONCE
    is_divisible: bool = True
    known: Mapping[int, tuple[Any, ...]] = field(default_factory=dict)

    def positions(self, part: Part) -> np.ndarray:
        """A part's rows; the longest come first, and equally long ones need no padding."""
        order = np.argsort(-self.rows.counted("num_tokens"), kind="stable").astype(np.int32)
        return order[np.arange(len(order)) // self.unit % part.count == part.index]

    def known_of(self, part: Part) -> dict[int, tuple[Any, ...]]:
        """The values of a part's rows that are known."""
        own = set(self.positions(part).tolist()) if self.known else ()
        return {index: values for index, values in self.known.items() if index in own}

    def batches(self, part: Part) -> Iterator[list[int]]:
        """Yield the positions of each batch of a part's rows that are not known."""
        own = self.positions(part)
        own = own[~np.isin(own, list(self.known))] if self.known else own
        start = 0
        while batch := own[start : start + self.size].tolist():
            yield batch  # after which the size may be smaller
            start += len(batch)

    def ask(
        self, positions: list[int], batch: Batch | None, reporter: "Reporter | None"
    ) -> Iterator[tuple[list[int], Sequence[Any]]]:
        """Yield what the rows at `positions` give, in as many batches as memory makes necessary."""
        if len(positions) <= self.size:
            try:
                values = self.run([self.rows[index] for index in positions], batch)
            except OutOfMemoryError:
                if len(positions) == 1 or not self.is_divisible:
                    raise
                self.size = len(positions) // 2
            else:
                yield positions, values
                return
            batch = None
            gc.collect()  # the error's frames hold what did not fit
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if reporter is not None:
                reporter.warn(
                    f"Memory does not hold {len(positions)} rows at once ({self.name.replace('_', ' ')}): from now on "
                    f"{self.size}."
                )
        for start in range(0, len(positions), size := self.size):
            yield from self.ask(positions[start : start + size], None, reporter)


@dataclass(frozen=True, slots=True)
class _Make:
    """Makes a batch of one pass, in a process that does not hold the model."""

    rows: Sequence[EncodedRows]
    collators: Sequence[Collator]
    pixels: torch.dtype | None

    def __call__(self, job: tuple[int, list[int]]) -> Batch:
        number, positions = job
        batch = self.collators[number]([self.rows[number][index] for index in positions])
        return batch if self.pixels is None else with_pixels_as(batch, self.pixels)


def in_batches(
    passes: Sequence[Pass],
    *,
    part: Part = WHOLE,
    num_workers: int = 0,
    pixels: torch.dtype | None = None,
    pin_memory: bool = False,
    reporter: "Reporter | None" = None,
) -> Iterator[tuple[Pass, list[int], Sequence[Any]]]:
    """Run one pass after another, and yield for each batch its pass, the rows' positions, and their values.

    Batches are made in `num_workers` processes, the same ones for all passes, with pixels of the dtype `pixels`. With
    `part` its rows only: as long as nothing is halved, batches of a unit are the same however many parts there are,
    and so are the values, to the bit.

    Raises:
        DataError: An image is damaged. Names row and file.
        MachineError: A process that makes batches died (names the row), or a single row does not fit in memory.
    """
    jobs = ((number, positions) for number, one in enumerate(passes) for positions in one.batches(part))
    make = _Make([one.rows for one in passes], [one.collator for one in passes], pixels)
    made = loaded(jobs, make, num_workers=num_workers, collators=make.collators, pin_memory=pin_memory)
    for (number, positions), batch in made:
        for some, values in passes[number].ask(positions, batch, reporter):
            yield passes[number], some, values
        del batch
