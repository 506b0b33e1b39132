"""`run.json`: what a run chose when it began and a resume must not change."""

import json
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import write_json_atomic

RUN_FILE = "run.json"


def read_run_file(run_dir: Path) -> dict[str, Any]:
    """Return what was written down; empty for a run that has not begun."""
    path = run_dir / RUN_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def keep_for_life(run_dir: Path, name: str, value: Any) -> Any:
    """Return what a run chose when it began, and write `value` down as that where it is new."""
    chosen = read_run_file(run_dir)
    if name not in chosen:
        write_json_atomic(run_dir / RUN_FILE, {**chosen, name: value})
        return value
    return chosen[name]
