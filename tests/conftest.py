"""Every test makes its own world: a folder of its own, no network, no hub, no clock."""

import atexit
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from absl import logging as absl_logging

from mllm_assets.layout import Layout

GOLDEN = Path(__file__).parent / "golden"

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DAGSTER_DISABLE_TELEMETRY"] = "1"
# Test processes share the cores: threads that wait for one another would wait for those of other tests as well
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What a shell starts in the background ignores Ctrl-C, and so would every process that the tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
# absl, which comes with rouge-score, closes what was stderr when it was imported, here a file of pytest's, as soon as
# Dagster configures the logs while a test captures them
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="Rewrite tests/golden from what the code does now.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if mark := item.get_closest_marker("attack"):
            item.user_properties.append(("attack", mark.args[0]))  # read by benchmarks/attack.py


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """A small Gemma 3, a ShareGPT dataset, and LLaMA-Factory's own trajectories on them. Read-only."""
    return GOLDEN / "parity"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """Compare a JSON-able value with `tests/golden/<name>.json`."""

    def compare(name: str, value: Any) -> None:
        path = GOLDEN / f"{name}.json"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        assert path.is_file(), f"{path.name} does not exist: run pytest --update-golden and read what it wrote"
        expected = json.loads(path.read_text(encoding="utf-8"))
        assert json.loads(json.dumps(value)) == expected, f"differs from golden {path.name}"

    return compare


@atexit.register
def _leave_quietly() -> None:
    """Silence duckdb's binding, which reports "nanobind: leaked ..." of itself at exit where torch is loaded too."""
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
