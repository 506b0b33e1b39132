"""Decisions of people: lines of JSON that are only ever added to a file, and read as input from outside.

They are a record, not a signature: whoever may write the file may write it.
"""

import getpass
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from mllm_assets.artifacts import write_text_atomic
from mllm_assets.errors import DataError, IntegrityError, MllmAssetsError, RecipeError

MAX_WHO_CHARS, MAX_WHY_CHARS = 100, 2000
Decision = TypeVar("Decision")


def user_name() -> str:
    """That of the person at this machine; empty for a user without one, as in a container."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""


def now_text() -> str:
    """ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def one_line(name: str, text: str, max_chars: int) -> str:
    """A text of a person on one line.

    Raises:
        RecipeError: It is too long, or holds what a terminal may obey.
    """
    text = " ".join(text.split())
    if len(text) > max_chars or not text.isprintable():
        raise RecipeError(f"{name} must be at most {max_chars:,} printable characters, and has {len(text):,}.")
    return text


def write_decision_file(path: Path, decisions: Iterable[Any], *, max_mib: int) -> None:
    """Replace a file by dataclasses, one a line; the caller holds its lock, and adds to what was read.

    Raises:
        DataError: It would be larger than is read again.
    """
    text = "".join(f"{json.dumps(asdict(one), ensure_ascii=False)}\n" for one in decisions)
    if len(text.encode()) > max_mib * 2**20:
        raise DataError(f"{path} would be larger than {max_mib} MiB. Nothing was added to it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, text)


def read_decision_file(path: Path, read: Callable[[Any], Decision], *, max_mib: int, cure: str) -> list[Decision]:
    """All decisions of a file, the oldest first; none of a file that does not exist.

    Raises:
        IntegrityError: `read` refuses a line, or the file is larger than any of ours gets. Names the line, says `cure`.
    """
    if not path.is_file():
        return []
    if path.stat().st_size > max_mib * 2**20:
        raise IntegrityError(f"{path} is larger than {max_mib} MiB, which no list of decisions is. Look at it.")
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            found.append(read(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, MllmAssetsError) as error:
            raise IntegrityError(
                f"{path}:{number} is not a decision ({type(error).__name__}), so none of the file is used. {cure}"
            ) from None
    return found
