"""Whether the artefact store answers, where one is set."""

from dataclasses import replace
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
        finding = Finding.of_error("store", "fail", error)
        return [replace(finding, next_step=finding.next_step or f"Look at {SETTING}.")]
    return [Finding("store", "ok", f"{url} answers")]
