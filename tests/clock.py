"""A wall clock that was set: what a process sees after a step by NTP, by a person, or of a laptop that woke up."""

import os
from pathlib import Path

import pytest

STEPS_S = (60, -60, 86400, -86400)


def clock_set_by(seconds: int) -> dict[str, str]:
    """Variables for a process whose wall clock is so far ahead; the kernel's own count and the files' times are true.

    A test that needs it is skipped where libfaketime is not installed: `make test-all` installs it.
    """
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not found:
        pytest.skip("libfaketime is not installed: make faketime")
    return {
        **os.environ,
        "LD_PRELOAD": str(found[0]),
        "FAKETIME": f"{seconds:+d}s",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }
