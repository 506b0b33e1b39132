"""The check of a GPU, as far as it runs without one: nobody should find a fault in it in their first hour on one."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]
REPOSITORY = Path(__file__).parents[2]


def ignore_interrupts() -> None:
    """As a shell does for what it starts in the background, where the check never saw the end of what it cancelled."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_the_check_of_a_gpu_passes_on_the_tiny_model_and_tells_what_is_measured_from_what_is_reckoned(
    tmp_path: Path,
) -> None:
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), "--work-dir", str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=1100, preexec_fn=ignore_interrupts,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    parts = results["parts"]
    assert results["note"].startswith("A dry run on a CPU")
    assert {name: found["failed"] for name, found in parts.items() if "failed" in found} == {}
    assert all(found.get("passed", True) for found in parts.values())
    trained = parts["projector"]
    assert {"memory_gib", "tflop_a_step", "tflop_per_s"} == set(trained["reckoned"])
    assert {"losses", "step_s", "phases_s", "num_waits"} <= set(trained["measured"])
    assert parts["cancelled"]["measured"]["num_left"] == 0
