"""Whether a server, such as vLLM, answers as the model that it was given: the same prompts, the same greedy answers.

A wrong chat template, another system text or other image settings in a served copy show as prompts of another length or
as other answers. Of a server there is no loss; what it says is compared row by row.
"""

import base64
import mimetypes
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from openai import APIError, OpenAI

from mllm_assets.data.sharegpt.conversation import IMAGE_PLACEHOLDER, SYSTEM
from mllm_assets.data.sharegpt.dataset import Entry
from mllm_assets.data.sharegpt.rows import Message, Row
from mllm_assets.errors import DataError, MachineError
from mllm_assets.evaluation.samples import good_rows, spread
from mllm_assets.inference.answerer import Answerer
from mllm_assets.progress import followed
from mllm_assets.recipe.asking import Sampling

NUM_SHOWN = 3  # rows that differ


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedTwice:
    """One row: how many tokens its prompt has here and there (None where the server does not say), and both answers."""

    sample_id: str
    prompt: str
    num_prompt_tokens: int
    num_served_prompt_tokens: int | None
    answer: str
    served_answer: str

    @property
    def agrees(self) -> bool:
        return self.answer.strip() == self.served_answer.strip()

    @property
    def has_same_length(self) -> bool:
        return self.num_served_prompt_tokens in (None, self.num_prompt_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedComparison:
    """What a server said beside what the model says.

    Attributes:
        min_agreement: The share of equal answers that is asked for.
    """

    rows: Sequence[AskedTwice]
    min_agreement: float

    @property
    def agreement(self) -> float:
        """The share of rows with the same answer."""
        return sum(row.agrees for row in self.rows) / len(self.rows)

    @property
    def num_other_prompts(self) -> int:
        """Rows whose prompts have another length there."""
        return sum(not row.has_same_length for row in self.rows)

    @property
    def passed(self) -> bool:
        return not self.num_other_prompts and self.agreement >= self.min_agreement

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = {name: getattr(self, name) for name in ("passed", "agreement", "min_agreement", "num_other_prompts")}
        return {**found, "rows": [asdict(row) for row in self.rows]}

    def describe(self) -> str:
        """Lines for a terminal: the figures, what is likely wrong, and rows that differ."""
        count = len(self.rows)
        unknown = all(row.num_served_prompt_tokens is None for row in self.rows)
        told = "the server does not count them" if unknown else f"{count - self.num_other_prompts} of {count}"
        lines = [
            f"prompts of the same length   {told}",
            f"equal answers                {sum(row.agrees for row in self.rows)} of {count}, "
            f"{self.min_agreement:.0%} is asked for",
        ]
        if self.num_other_prompts:
            lines.append(
                "The served copy makes other prompts: compare its chat template, system text and image settings."
            )
        elif not self.passed:
            lines.append("Prompts are as long, answers differ: compare weights, image mean and precision.")
        for row in islice((row for row in self.rows if not (row.agrees and row.has_same_length)), NUM_SHOWN):
            lines += [
                f"  {row.sample_id}: {row.prompt!r}",
                f"    here   {row.num_prompt_tokens} tokens, {row.answer!r}",
                f"    there  {row.num_served_prompt_tokens or '?'} tokens, {row.served_answer!r}",
            ]
        return "\n".join(lines)


def compare_served(
    answerer: Answerer,
    entry: Entry,
    client: OpenAI,
    *,
    served_name: str | None,
    max_samples: int | None,
    max_new_tokens: int,
    min_agreement: float,
) -> ServedComparison:
    """Ask a loaded model and a server the same, the likeliest token at each place.

    `max_samples` rows, spread over the entry, are asked, what follows their last question left out. Without
    `served_name` the server's only model is asked.

    Raises:
        MachineError: The server does not answer, refuses, or has several models.
        DataError: A row cannot be asked.
    """
    places = spread(len(asked := good_rows(entry)), max_samples)
    if not places:
        raise DataError(f"{entry.name} has no row to ask about. Name another entry.")
    name = served_name or _only_model(client)
    found = []
    rows = _rows(entry, [asked[place] for place in places])
    for row in followed(rows, "asked here and there", len(places)):
        encoded = answerer.encoder.encode_prompt(row)
        [own] = answerer.answers([encoded], Sampling(max_new_tokens=max_new_tokens))
        text, num_tokens = _asked(client, name, _messages(row, answerer.encoder.turns.system), max_new_tokens)
        found.append(
            AskedTwice(
                sample_id=row.id,
                prompt=row.messages[-2].content.replace(IMAGE_PLACEHOLDER, "").strip(),
                num_prompt_tokens=len(encoded.input_ids),
                num_served_prompt_tokens=num_tokens,
                answer=own.text,
                served_answer=text,
            )
        )
    return ServedComparison(rows=found, min_agreement=min_agreement)


def _rows(entry: Entry, indices: Sequence[int]) -> Iterator[Row]:
    wanted = set(indices)
    for index, parse in enumerate(entry.unparsed()):
        if index in wanted:
            yield parse()


def _messages(row: Row, system: str | None) -> list[dict[str, Any]]:
    """What precedes a row's last answer, as OpenAI's clients say it.

    Raises:
        DataError: The row has tools, which a chat request says in a way of its own.
    """
    if row.tools:
        raise DataError(f"Row {row.id} has tools, and a server is not asked with those here. Name another entry.")
    images = iter(row.images)
    messages = list(row.messages[:-1])
    if system and messages[0].role != SYSTEM:
        messages.insert(0, Message(SYSTEM, system))
    return [{"role": message.role, "content": _content(message.content, images)} for message in messages]


def _content(text: str, images: Iterator[Path]) -> str | list[dict[str, Any]]:
    first, *others = text.split(IMAGE_PLACEHOLDER)
    if not others:
        return text
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}] if first else []
    for after in others:
        parts.append({"type": "image_url", "image_url": {"url": _data_url(next(images))}})
        parts += [{"type": "text", "text": after}] if after else []
    return parts


def _data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _only_model(client: OpenAI) -> str:
    try:
        names = [model.id for model in client.models.list().data]
    except APIError as error:
        raise _refused(client, error) from None
    if len(names) != 1:
        raise MachineError(
            f"{client.base_url} has {len(names)} models ({', '.join(names[:5])}). Name one: --served-name"
        )
    return names[0]


def _asked(client: OpenAI, name: str, messages: Any, max_new_tokens: int) -> tuple[str, int | None]:
    """A server's answer, and how many tokens its prompt had there if the server says it."""
    try:
        given = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=max_new_tokens)
    except APIError as error:
        raise _refused(client, error) from None
    if not given.choices:
        raise MachineError(f"{client.base_url} gave no answer. Look at the server's log.")
    return given.choices[0].message.content or "", given.usage.prompt_tokens if given.usage else None


def _refused(client: OpenAI, error: APIError) -> MachineError:
    cause = " ".join(str(error.__cause__ or error).split())[:300]
    return MachineError(
        f"{client.base_url} does not answer as an OpenAI-compatible server does ({type(error).__name__}: {cause}). "
        "Check address, key (MLLM_ASSETS_API_KEY) and the server's log."
    )
