"""Asks a model and a copy of it the same, one row after another: the same prompts, the same greedy answers, the loss.

A wrong chat template, another system text or other image settings in a copy show as other prompts or as other answers.
"""

from collections.abc import Sequence
from typing import Protocol

from mllm_assets.data.sharegpt.conversation import IMAGE_PLACEHOLDER
from mllm_assets.data.sharegpt.dataset import Entry
from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.errors import DataError
from mllm_assets.evaluation.agreement import Agreement, AskedTwice, Comparison, Told
from mllm_assets.evaluation.samples import good_rows, spread
from mllm_assets.inference.answerer import Answerer
from mllm_assets.progress import followed
from mllm_assets.recipe.asking import Sampling


class Asked(Protocol):
    """Something that answers rows."""

    def ask(self, row: Row, max_new_tokens: int) -> Told:
        """Answer what precedes the row's last answer, the likeliest token at each place."""
        ...


class Loaded:
    """A model that this process has loaded.

    Args:
        answerer: The model.
        scores: Whether the loss of each row is wanted.
    """

    def __init__(self, answerer: Answerer, *, scores: bool) -> None:
        self._answerer, self._scores = answerer, scores

    def ask(self, row: Row, max_new_tokens: int) -> Told:
        encoded = self._answerer.encoder.encode_prompt(row)
        loss = self._answerer.losses([self._answerer.encoder.encode(row)])[0][0] if self._scores else None
        [answer] = self._answerer.answers([encoded], Sampling(max_new_tokens=max_new_tokens))
        return Told(
            text=answer.text,
            num_prompt_tokens=len(encoded.input_ids),
            num_tokens=answer.num_tokens,
            wall_s=answer.latency_s,
            prompt_ids=list(encoded.input_ids),
            loss_nats=loss,
        )


def compare(model: Asked, copy: Asked, rows: Sequence[Row], asked_for: Agreement) -> Comparison:
    """Ask a model and a copy of it the same.

    Raises:
        DataError: A row cannot be asked.
        MachineError: A server does not answer.
    """
    found = [
        AskedTwice(
            sample_id=row.id,
            prompt=row.messages[-2].content.replace(IMAGE_PLACEHOLDER, "").strip(),
            own=model.ask(row, asked_for.max_new_tokens),
            copy=copy.ask(row, asked_for.max_new_tokens),
        )
        for row in followed(rows, "asked of model and copy", len(rows))
    ]
    return Comparison(rows=found, asked_for=asked_for)


def some_rows(entry: Entry, asked_for: Agreement) -> list[Row]:
    """Rows of an entry, spread evenly over it.

    Raises:
        DataError: There is none.
    """
    places = spread(len(asked := good_rows(entry)), asked_for.max_samples)
    if not places:
        raise DataError(f"{entry.name} has no row to ask about. Name another entry.")
    wanted = {asked[place] for place in places}
    return [parse() for index, parse in enumerate(entry.unparsed()) if index in wanted]
