"""Whether the artefact store answers, where one is set."""

from pathlib import Path

from mllm_assets.errors import SourceError
from mllm_assets.operations.findings import Finding
from mllm_assets.store import Store
from mllm_assets.store_errors import SETTING


def check_store(url: str, root: Path) -> list[Finding]:
    """Ask the store for something small; nothing is written to it."""
    if not url:
        return []
    try:
        Store(url, root).pointer("doctor")
    except SourceError as error:
        what, _, step = str(error).partition(". ")
        return [Finding("store", "fail", f"{what}.", step or f"Look at {SETTING}.")]
    return [Finding("store", "ok", f"{url} answers")]
