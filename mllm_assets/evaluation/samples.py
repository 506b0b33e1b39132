"""The rows that an evaluation asks about, and whose pictures stand in for theirs.

A few are held in memory. Of many, such as a whole entry of a million, none is: they are parsed as they are wanted, and
encoded into mapped files below `cache/rows`, once for both models.
"""

import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_assets.data.sharegpt.conversation import FUNCTION
from mllm_assets.data.sharegpt.dataset import Dataset, Entry
from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.errors import RecipeError
from mllm_assets.evaluation.forgetting import unrelated_entries
from mllm_assets.families.turn_format import Template
from mllm_assets.training.encoding.encode import Encoder
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.encoding.row_files import PART_ROWS, Source, rows_fingerprint, stored_rows
from mllm_assets.worker.tasks import EvaluateTask

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

SHUFFLE_SEED = 42
_MOST_SHIFTS = 100  # a pair that still shares a file after so many tries goes without a partner
Parse = Callable[[], Row]


@dataclass(frozen=True, slots=True)
class EncodedSamples:
    """What a model is asked.

    Attributes:
        own: The samples.
        swapped: Those for which there is another one, with its images instead of their own.
        paired: Which those are.
        prompts: What precedes the last answer of each sample.
    """

    own: EncodedRows
    swapped: EncodedRows
    paired: np.ndarray
    prompts: EncodedRows


class EntrySamples:
    """The rows of one entry that are asked about.

    Args:
        entry: The entry.
        indices: Which of its rows.
        in_pairs: They are asked about as pairs of answers.
    """

    def __init__(self, entry: Entry, indices: Sequence[int], *, in_pairs: bool = False) -> None:
        self.entry, self.indices, self._in_pairs = entry, indices, in_pairs
        self._kept = [parse() for parse in self._chosen()] if len(indices) <= PART_ROWS else None

    def __len__(self) -> int:
        return len(self.indices)

    def unparsed(self) -> Iterator[Parse]:
        """Each row in turn, parsed when it is called if it is not held."""
        if self._kept is None:
            return self._chosen()
        return (partial(_same, row) for row in self._kept)

    def _chosen(self) -> Iterator[Parse]:
        wanted = iter(self.indices)
        index = next(wanted, None)
        for number, parse in enumerate(self.entry.unparsed()):
            if number == index:
                yield parse
                index = next(wanted, None)

    def encoded(self, encoder: Encoder, rows_root: Path | None, reporter: "Reporter") -> EncodedSamples:
        """Encode them, as far as they are not below `rows_root`."""
        make = partial(self._encoded, encoder, rows_root, reporter)
        told, apart = (encoder.encode_pair, ["pairs"]) if self._in_pairs else (encoder.encode, [])
        own = make(["own", *apart] if apart else "own", lambda parse: told(parse()), self.unparsed, len(self))
        pictures = own.numbered_pictures()
        partners = shuffled_partners(pictures.numbers, pictures.ends, seed=SHUFFLE_SEED)
        paired = np.flatnonzero(partners >= 0)

        def with_partners() -> Iterator[tuple[Parse, int]]:
            return ((parse, other) for parse, other in zip(self.unparsed(), partners, strict=True) if other >= 0)

        # encoded again: an image of another size may take another number of tokens
        swapped = make(
            ["swapped", SHUFFLE_SEED, *apart],
            lambda one: told(replace(one[0](), images=pictures.of(int(one[1])))),
            with_partners,
            len(paired),
        )
        prompts = make("prompts", lambda parse: encoder.encode_prompt(parse()), self.unparsed, len(self))
        return EncodedSamples(own, swapped, paired, prompts)

    def _encoded(
        self,
        encoder: Encoder,
        rows_root: Path | None,
        reporter: "Reporter",
        what: Any,
        encode: Callable[[Any], EncodedRow],
        rows: Callable[[], Iterable[Any]],
        count: int,
    ) -> EncodedRows:
        folder, in_pairs = self.entry.dataset.folder, self._in_pairs and what != "prompts"
        if rows_root is None or self._kept is not None:
            return EncodedRows.of(map(encode, rows()), encoder.image_token_id, folder, in_pairs=in_pairs)
        digests = self.entry.dataset.digests
        files = None if encoder.sees_sizes else list(self.entry.file_digests)
        source = Source(
            count=count,
            rows=rows,
            encode=encode,
            require_unchanged=lambda: digests.require_unchanged(files),
            folder=folder,
            image_token_id=encoder.image_token_id,
            in_pairs=in_pairs,
        )
        named = rows_fingerprint(encoder, ["asked", what, self.entry.identity, len(self)])
        return stored_rows(rows_root / named, source, digests, reporter)


class Samples:
    """The rows of all entries that are asked about, numbered one after another."""

    def __init__(self, entries: Sequence[EntrySamples]) -> None:
        self.entries = entries

    def __len__(self) -> int:
        return sum(map(len, self.entries))

    def __iter__(self) -> Iterator[tuple[str, int, Row]]:
        """Each sample's entry, its number in that, and its row."""
        for some in self.entries:
            for index, parse in zip(some.indices, some.unparsed(), strict=True):
                yield some.entry.name, index, parse()

    def encoded(self, encoder: Encoder, rows_root: Path | None, reporter: "Reporter") -> EncodedSamples:
        """Encode them, as far as they are not below `rows_root`."""
        parts = [some.encoded(encoder, rows_root, reporter) for some in self.entries]
        starts = np.cumsum([0, *(len(part.own) for part in parts[:-1])])
        return EncodedSamples(
            own=_joined([part.own for part in parts]),
            swapped=_joined([part.swapped for part in parts]),
            paired=np.concatenate([part.paired + start for part, start in zip(parts, starts, strict=True)]),
            prompts=_joined([part.prompts for part in parts]),
        )


def load_samples(task: EvaluateTask, dataset: Dataset) -> Samples:
    """Find the rows of a task's entries that are asked about.

    Raises:
        IntegrityError: An image or an entry changed. Names it.
        RecipeError: A reward model is asked about an entry without pairs.
    """
    samples, in_pairs = [], task.recipe.learns_scores
    entries = {name: dataset.entry(name) for name in task.entries}
    if not in_pairs:  # which are never of pairs
        entries |= unrelated_entries(dataset, task.settings.unrelated, task.recipe.train_entries)
    expected = task.data_digests | task.unrelated_digests
    for name, entry in entries.items():
        entry.require_unchanged(expected.get(name))
        if in_pairs and not entry.info.ranking:
            raise RecipeError(
                f"stage is rm, whose model is judged by pairs of answers, and the entry {name} has none: it does not "
                "set `ranking`. Name an entry of pairs in eval_dataset."
            )
        asked = good_rows(entry)
        places = spread(len(asked), task.settings.max_samples)
        chosen = asked if len(places) == len(asked) else [asked[place] for place in places]
        samples.append(EntrySamples(entry, chosen, in_pairs=in_pairs))
    return Samples(samples)


def good_rows(entry: Entry) -> Sequence[int]:
    """Those whose answer is not marked as a bad one, which is no reference."""
    if "kto_tag" not in entry.info.columns:
        return range(entry.num_rows)
    return array("i", (index for index, row in enumerate(entry.each()) if row.mark is not False))


def reference_of(row: Row, template: Template) -> str:
    """The right answer of a row, as a model writes it."""
    last = row.messages[-1]
    return template.written_call(last.content, f"Row {row.id}") if last.role == FUNCTION else last.content


def spread(num_rows: int, max_samples: int | None) -> Sequence[int]:
    """Which rows are asked about: some from everywhere, for the first of a source may all be of one class."""
    num_samples = min(num_rows, max_samples or num_rows)
    if num_samples == num_rows:
        return range(num_rows)
    return [number * num_rows // max(num_samples, 1) for number in range(num_samples)]


def shuffled_partners(images: np.ndarray, ends: np.ndarray, *, seed: int) -> np.ndarray:
    """Pair each sample with another one that has as many images, all of them different files.

    The pairing is a permutation within the samples of one image count: every sample's images are used once, none by
    its own sample. It depends on the samples and the seed only.

    Args:
        images: A number for each image of all samples, the same for the same file.
        ends: Where the images of each sample end, behind a 0.
        seed: Of the pairing.

    Returns:
        For each sample the index of its partner; -1 for a sample without images or without a partner.
    """
    counts = np.diff(ends)
    partners = np.full(len(counts), -1, np.int32)
    generator = random.Random(seed)
    for count in np.unique(counts[counts > 0]).tolist():
        shuffled = array("i", np.flatnonzero(counts == count).astype(np.int32).tobytes())
        generator.shuffle(shuffled)
        order = np.array(shuffled, np.int32)
        of_each = images[ends[:-1][order][:, None] + np.arange(count)]
        shift = _best_shift(of_each)
        apart = ~_share(of_each, shift)
        partners[order[apart]] = np.roll(order, -shift)[apart]
    return partners


def _best_shift(images: np.ndarray) -> int:
    """The rotation with the fewest pairs that share a file; the first one without any, in almost every dataset."""
    best, best_num_shared = 0, len(images)
    for shift in range(1, min(len(images), _MOST_SHIFTS)):
        num_shared = int(np.count_nonzero(_share(images, shift)))
        if num_shared < best_num_shared:
            best, best_num_shared = shift, num_shared
        if not num_shared:
            break
    return best


def _share(images: np.ndarray, shift: int) -> np.ndarray:
    """Which rows of images have one that is in the row `shift` further on, too."""
    others = np.roll(images, -shift, axis=0)
    found = np.zeros(len(images), bool)
    for column in range(images.shape[1]):
        found |= (others == images[:, column : column + 1]).any(axis=1)
    return found


def _joined(parts: Sequence[EncodedRows]) -> EncodedRows:
    return sum(parts[1:], parts[0])


def _same(row: Row) -> Row:
    return row
