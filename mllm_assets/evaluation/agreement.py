"""How far a copy of a model answers as the model does: in another precision, another format, or behind a server."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from mllm_assets.errors import RecipeError

ANSWERS_ALIKE = "answers_like_the_checkpoint"
NUM_SHOWN = 3  # rows that differ


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """What is asked of a copy of a model.

    Attributes:
        max_samples: Rows of the recipe's first evaluation entry, spread evenly over it, that model and copy are asked.
        max_new_tokens: Tokens after which an answer is cut.
        min_agreement: The share of rows with the same answer, the likeliest token taken at each place.
        max_loss_distance_nats: How far the copy's mean loss may be from the model's, where the copy gives losses.
    """

    max_samples: int = 32
    max_new_tokens: int = 64
    min_agreement: float = 0.9
    max_loss_distance_nats: float = 0.02

    def __post_init__(self) -> None:
        for name in ("max_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}: expected 1 or more. Change it.")
        if not 0 <= self.min_agreement <= 1:
            raise RecipeError(f"min_agreement is {self.min_agreement}: expected a share of 0 to 1. Change it.")
        if not self.max_loss_distance_nats >= 0:
            raise RecipeError(
                f"max_loss_distance_nats is {self.max_loss_distance_nats}: expected 0 or more. Change it."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What one of the two said of a row; what it does not say is None.

    Attributes:
        prompt_ids: The tokens of the prompt.
        loss_nats: Of the row's own answer.
        num_tokens: Of the answer.
    """

    text: str
    num_prompt_tokens: int | None
    num_tokens: int | None
    wall_s: float
    prompt_ids: Sequence[int] | None = None
    loss_nats: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedTwice:
    """One row, and what the model and its copy said of it."""

    sample_id: str
    prompt: str
    own: Told
    copy: Told

    @property
    def agrees(self) -> bool:
        return self.own.text.strip() == self.copy.text.strip()

    @property
    def has_same_prompt(self) -> bool:
        """The same tokens where the copy says them, else as many, where it says that."""
        if self.copy.prompt_ids is not None:
            return self.copy.prompt_ids == self.own.prompt_ids
        return self.copy.num_prompt_tokens in (None, self.own.num_prompt_tokens)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the prompt's tokens."""
        told = {who: asdict(getattr(self, who)) for who in ("own", "copy")}
        for one in told.values():
            one.pop("prompt_ids")
        return {"sample_id": self.sample_id, "prompt": self.prompt, "agrees": self.agrees, **told}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What a copy said beside what the model says."""

    rows: Sequence[AskedTwice]
    asked_for: Agreement

    @property
    def agreement(self) -> float:
        """The share of rows with the same answer."""
        return sum(row.agrees for row in self.rows) / len(self.rows)

    @property
    def num_other_prompts(self) -> int:
        """Rows whose prompts are others there."""
        return sum(not row.has_same_prompt for row in self.rows)

    @property
    def losses_nats(self) -> tuple[float, float] | None:
        """The mean losses of the model and of the copy, where the copy gives them."""
        pairs = [
            (row.own.loss_nats, row.copy.loss_nats)
            for row in self.rows
            if row.own.loss_nats is not None and row.copy.loss_nats is not None
        ]
        if not pairs:
            return None
        own, copy = (sum(some) / len(pairs) for some in zip(*pairs, strict=True))
        return own, copy

    @property
    def loss_distance_nats(self) -> float | None:
        losses = self.losses_nats
        return None if losses is None else abs(losses[1] - losses[0])

    @property
    def passed(self) -> bool:
        distance = self.loss_distance_nats
        near = distance is None or distance <= self.asked_for.max_loss_distance_nats
        return not self.num_other_prompts and self.agreement >= self.asked_for.min_agreement and near

    def tokens_per_s(self, who: str) -> float | None:
        """How fast one of the two ("own", "copy") answered, one row at a time; None where tokens are not counted."""
        told: list[Told] = [getattr(row, who) for row in self.rows]
        counts = [one.num_tokens for one in told if one.num_tokens is not None]
        seconds = sum(one.wall_s for one in told)
        return sum(counts) / seconds if len(counts) == len(told) and seconds > 0 else None

    def facts(self) -> dict[str, Any]:
        """The figures; those that the copy does not give are left out."""
        losses = self.losses_nats
        found = {
            "passed": self.passed,
            "num_samples": len(self.rows),
            "agreement": self.agreement,
            "min_agreement": self.asked_for.min_agreement,
            "num_other_prompts": self.num_other_prompts,
            "loss_nats": losses and losses[0],
            "loss_of_copy_nats": losses and losses[1],
            "loss_distance_nats": self.loss_distance_nats,
            "max_loss_distance_nats": self.asked_for.max_loss_distance_nats if losses else None,
            "tokens_per_s": self.tokens_per_s("own"),
            "tokens_per_s_of_copy": self.tokens_per_s("copy"),
        }
        return {name: value for name, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Figures and rows, JSON-able."""
        return {**self.facts(), "rows": [row.to_dict() for row in self.rows]}

    def describe(self) -> str:
        """Lines for a terminal: the figures, what is likely wrong, and rows that differ."""
        return "\n".join([*self._figures(), *self._likely_wrong(), *self._different()])

    def _figures(self) -> Iterator[str]:
        count = len(self.rows)
        knows_ids = all(row.copy.prompt_ids is not None for row in self.rows)
        unknown = all(row.copy.num_prompt_tokens is None for row in self.rows)
        told = "the server does not count them" if unknown else f"{count - self.num_other_prompts} of {count}"
        yield f"prompts of the same {'tokens' if knows_ids else 'length'}   {told}"
        agreeing = sum(row.agrees for row in self.rows)
        yield f"equal answers                {agreeing} of {count}, {self.asked_for.min_agreement:.0%} is asked for"
        if losses := self.losses_nats:
            allowed = self.asked_for.max_loss_distance_nats
            found = f"{losses[0]:.4f} here, {losses[1]:.4f} there"
            yield f"loss                         {found}; {allowed:g} apart is allowed"

    def _likely_wrong(self) -> Iterator[str]:
        if self.num_other_prompts:
            yield "The copy makes other prompts: compare its chat template, system text and image settings."
        elif not self.passed:
            yield "Prompts are the same, answers or losses are not: compare weights, image mean and precision."

    def _different(self) -> Iterator[str]:
        for row in islice((row for row in self.rows if not (row.agrees and row.has_same_prompt)), NUM_SHOWN):
            yield f"  {row.sample_id}: {row.prompt!r}"
            yield f"    here   {row.own.num_prompt_tokens} tokens, {row.own.text!r}"
            yield f"    there  {row.copy.num_prompt_tokens or '?'} tokens, {row.copy.text!r}"
