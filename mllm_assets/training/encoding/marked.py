"""Answers that are marked good or bad: each beside its question with another row's answer.

The other answer, to a question that it does not belong to, tells how far the model has moved from where it started
(KTO's estimate of the KL divergence). Which row lends it depends on the order after mixing and splitting, so that the
two are put together here, from rows that were encoded whole.

Source: llamafactory 0.9.5, `FeedbackDatasetProcessor`.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_assets.errors import DataError
from mllm_assets.file_digests import FileDigests
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.encoding.encode import Encoder
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.packing import groups_of
from mllm_assets.training.encoding.row import IGNORE_INDEX, EncodedRow, Tokens
from mllm_assets.training.encoding.row_files import Source, rows_fingerprint, stored_rows
from mllm_assets.training.encoding.turns import shared_room

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter


def lenders(num_rows: int, group_size: int, num_groups: int | None) -> Iterator[int]:
    """For each row the one whose answer it borrows: the one before it, and for the first of a group the last."""
    for group in groups_of(num_rows, group_size, num_groups):
        yield from (group[-1], *group[:-1])


def beside(row: EncodedRow, lender: EncodedRow, encoder: Encoder) -> EncodedRow:
    """A row cut to `cutoff_len`, and as its `other` the same question with the lender's answer.

    Raises:
        DataError: `cutoff_len` cuts into an image. Names the row.
    """
    prompt, answer = _parts(row)
    own = _cut(row, prompt, answer, encoder)
    return replace(own, other=replace(_cut(row, prompt, _parts(lender)[1], encoder), mark=None))


def _parts(row: EncodedRow) -> tuple[Tokens, Tokens]:
    num_prompt = len(row.input_ids) - row.num_supervised
    return row.input_ids[:num_prompt], row.input_ids[num_prompt:]


def _cut(row: EncodedRow, prompt: Tokens, answer: Tokens, encoder: Encoder) -> EncodedRow:
    num_prompt, num_answer = shared_room(len(prompt), len(answer), encoder.cutoff_len)
    if encoder.image_token_id in prompt[num_prompt:]:
        raise DataError(f"Row {row.id} is cut inside its images: cutoff_len is {encoder.cutoff_len}. Raise it.")
    kept, told = prompt[:num_prompt], answer[:num_answer]
    num_cut = len(prompt) + len(answer) - len(kept) - len(told)
    ignored = array("i", [IGNORE_INDEX]) * len(kept)
    return replace(row, input_ids=kept + told, labels=ignored + told, num_tokens_cut=num_cut)


def with_others(
    rows: EncodedRows, encoder: Encoder, spec: TrainSpec, place: tuple[Path, Path], digests: FileDigests,
    reporter: "Reporter",
) -> EncodedRows:  # fmt: skip
    """Return marked rows beside their others, put together now if they were not before.

    Args:
        rows: In the order in which they are trained on or evaluated.
        encoder: That made them.
        spec: Says which rows lend one another their answers.
        place: The folder of encoded rows, and the one that pictures are relative to.
        digests: Of files that are mapped.
        reporter: Told of the work.
    """
    if not len(rows):
        return rows
    rows_root, folder = place
    groups = (spec.preprocessing_batch_size, spec.preprocessing_num_workers)
    source = Source(
        count=len(rows),
        rows=lambda: enumerate(lenders(len(rows), *groups)),
        encode=lambda pair: beside(rows[pair[0]], rows[pair[1]], encoder),
        require_unchanged=lambda: None,
        folder=folder,
        image_token_id=encoder.image_token_id,
        in_pairs=True,
    )
    name = rows_fingerprint(encoder, ["marked", rows.identity, groups])
    return stored_rows(rows_root / name, source, digests, reporter)


def note_on_marks(parts: Sequence[EncodedRows], reporter: "Reporter") -> None:
    """Say where all answers that are trained on are of one kind."""
    marks = parts[0].counted("mark")
    if len(marks) and abs(int(marks.sum())) == len(marks):
        kind = "good" if marks[0] > 0 else "bad"
        reporter.warn(f"All {len(marks)} answers are marked {kind}: nothing tells what to prefer.")
