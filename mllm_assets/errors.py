"""The user's errors: each class says who should act; each message says what is wrong, where, and one next step."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches

from mllm_assets.redaction import redacted

LETTERS_A_MISTAKE = 10  # one mistake in a name, two from 20 letters: what differs by more is another name
MIN_BEGINNING = 6  # letters of a name that was not typed to its end
MIN_LETTERS = 3  # any two letters are like any others


def nearest(name: str, known: Collection[str], most: int = 1) -> list[str]:
    """The known names that `name` may be a typing mistake of, the likeliest first, or the only one that it begins."""
    if len(name) < MIN_LETTERS:
        return []
    mistakes = max(1, len(name) // LETTERS_A_MISTAKE)
    names = {other.lower(): other for other in sorted(known) if abs(len(other) - len(name)) <= mistakes}
    likeness = 1 - mistakes / len(name) - 1e-9  # difflib's ratio of two names that differ in so many letters
    alike = [names[found] for found in get_close_matches(name.lower(), names, n=most, cutoff=likeness)]
    begun = [other for other in known if other.lower().startswith(name.lower())] if len(name) >= MIN_BEGINNING else []
    return alike or (begun if len(begun) == 1 else [])


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A question for a message, with a space after it, or nothing."""
    return "".join(f"Did you mean {near!r}? " for near in nearest(name, known))


def all_of(problems: Iterable[str], most: int = 20) -> str:
    """The text of an error of several problems, one a line."""
    lines = list(dict.fromkeys(problems))
    more = [f"and {len(lines) - most} more."] if len(lines) > most else []
    return "\n".join([*lines[:most], *more])


class MllmAssetsError(Exception):
    """Something that the user can fix. Shown without a traceback; never retried. Its text holds no secret."""

    def __str__(self) -> str:
        return redacted(super().__str__())


class RecipeError(MllmAssetsError):
    """The recipe or component YAML must change."""


class DataError(MllmAssetsError):
    """A dataset's files must change."""


class SourceError(MllmAssetsError):
    """A hub, network or credential must change."""


class ModelError(MllmAssetsError):
    """A model directory must change."""


class MachineError(MllmAssetsError):
    """The machine must change: device, memory or disk."""


class OutOfMemoryError(MachineError):
    """The machine has less memory than was asked of it at once."""


class IntegrityError(MllmAssetsError):
    """Something this project wrote is missing or damaged and must be made again."""


class GateError(MllmAssetsError):
    """The model must get better, or its gates change, before it is released."""
