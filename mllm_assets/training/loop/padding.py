"""How much of a run's batches holds no token."""

from dataclasses import dataclass

NOTABLE_PADDING = 0.1  # a tenth of a step is spent on nothing


@dataclass(slots=True)
class PaddingCount:
    """How much of the batches of this process was computed for nothing, since it started or resumed."""

    num_tokens: int = 0
    num_padding: int = 0

    def add(self, num_tokens: int, num_padding: int) -> None:
        self.num_tokens += num_tokens
        self.num_padding += num_padding

    @property
    def share(self) -> float | None:
        """Of all places of the batches; None before the first."""
        num_places = self.num_tokens + self.num_padding
        return self.num_padding / num_places if num_places else None

    def notice(self, strategy: str) -> str | None:
        """What the log says of it, where it is worth a change."""
        if not self.share or self.share < NOTABLE_PADDING:
            return None
        cure = " group_by_length: true puts rows of about one length together." if strategy == "random" else ""
        return f"padding: {self.share:.0%} of the places in the batches hold no token.{cure}"
