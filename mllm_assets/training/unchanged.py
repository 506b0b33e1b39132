"""What a run was named by must be what it reads: rows and model are looked at again before it trains."""

from collections.abc import Mapping
from pathlib import Path

from mllm_assets.data.sharegpt import entry_digest
from mllm_assets.errors import IntegrityError
from mllm_assets.training.model_directory import model_fingerprint
from mllm_assets.training.ranks import is_first_rank


def require_same_data(data_dir: Path, digests: Mapping[str, str]) -> None:
    """Refuse data that changed since the run was named by it.

    Raises:
        IntegrityError: Names the entry.
    """
    for entry, expected in digests.items():
        found = entry_digest(data_dir, entry)
        if found != expected:
            raise _changed(f"The entry {entry} in {data_dir}", expected, found)


def require_same_model(model_dir: Path, fingerprint: str | None) -> None:
    """Refuse a model that is not the one the run was named by, or whose bytes are not those that were written.

    Every byte is read, once for all processes of a run: weights that changed on disk load without an error.

    Raises:
        IntegrityError: Names the file where a manifest speaks for it.
    """
    if fingerprint is None or not is_first_rank():
        return
    found = model_fingerprint(model_dir, deep=True)
    if found != fingerprint:
        raise _changed(f"The model in {model_dir}", fingerprint, found)


def _changed(what: str, expected: str, found: str) -> IntegrityError:
    return IntegrityError(
        f"{what} changed after this run was named by its content: expected digest {expected[:12]}, found {found[:12]}. "
        f"Start the run again: it gets a name of its own."
    )
