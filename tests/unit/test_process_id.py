"""Process identities and elapsed times that do not depend on the wall clock."""

import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from mllm_assets.process_id import Moment, ProcessId, pid_is_free
from tests.clock import STEPS_S, clock_set_by

HERE = ProcessId.of(os.getpid())
ASK = "import os; from mllm_assets.process_id import ProcessId; print(ProcessId.of(os.getppid()))"


def test_a_killed_process_that_its_parent_has_not_reaped_counts_as_gone() -> None:
    """A signal of 0 reaches a zombie: its run kept the pool slot, and the next `make demo` waited for ever."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = ProcessId.of(process.pid)
    assert known is not None and not known.has_ended() and not pid_is_free(process.pid)
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert known.has_ended() and pid_is_free(process.pid)
    process.communicate()
    assert known.has_ended() and ProcessId.of(process.pid) is None


@pytest.mark.attack("clock")
@pytest.mark.parametrize("seconds", STEPS_S)
def test_a_process_is_the_same_one_after_the_clock_was_set(seconds: int) -> None:
    """Its start was computed from the wall clock, so a step of a minute made another process of it."""
    said = subprocess.run([sys.executable, "-c", ASK], env=clock_set_by(seconds), capture_output=True, text=True)
    assert HERE is not None and said.stdout.strip() == str(HERE), said.stderr


@pytest.mark.attack("clock")
@pytest.mark.parametrize(
    ("changed", "ended"),
    [
        ({}, False),
        ({"started": "1"}, True),  # the pid came round
        ({"boot": "another"}, True),  # the machine was started again
        ({"boot": "another", "machine": "another"}, False),  # nothing is known of another machine's
        ({"started": "1", "namespace": "pid:[1]"}, False),  # nor of another container's
        ({"started": ""}, False),  # nobody could say when it started
    ],
)
def test_a_process_has_ended_only_where_that_is_certain(changed: dict[str, str], ended: bool) -> None:
    assert HERE is not None and replace(HERE, **changed).has_ended() is ended


def test_what_was_recorded_is_read_back() -> None:
    now = Moment.now()
    assert HERE is not None and ProcessId(**asdict(HERE)) == HERE and Moment.from_dict(asdict(now)) == now
    assert Moment.from_dict({"boot": "x"}) is None and Moment.from_dict("yesterday") is None


def test_time_is_measured_by_the_kernels_count_and_after_a_restart_by_a_wall_clock_that_is_never_behind() -> None:
    now = Moment.now()
    assert 0 <= replace(now, unix_s=now.unix_s - 86400).elapsed_s() < 5, "the clock was set forward"
    assert 0 <= replace(now, unix_s=now.unix_s + 86400).elapsed_s() < 5, "it was set back"
    assert 10 <= replace(now, boot="another", unix_s=now.unix_s - 10).elapsed_s() < 15
    assert replace(now, boot="another", unix_s=now.unix_s + 86400).elapsed_s() == 0
