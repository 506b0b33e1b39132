"""Directories that are built beside their place: what a killed process left goes, what a living one builds stays."""

import signal
import subprocess
import sys
from pathlib import Path

from mllm_assets.artifacts import staging_directory

BUILD = """
import sys, time
from pathlib import Path
from mllm_assets.artifacts import staging_directory

with staging_directory(Path(sys.argv[1])) as staging:
    (staging / "half").write_text("half")
    print(flush=True)
    time.sleep(60)
"""


def build_apart(parent: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(parent)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_the_staging_of_a_killed_process_is_deleted_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    with build_apart(tmp_path) as killed, build_apart(tmp_path) as living:
        assert len(list(tmp_path.glob(".*.tmp/half"))) == 2
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        with staging_directory(tmp_path):
            assert len(list(tmp_path.glob(".*.tmp/half"))) == 1
        living.terminate()
    with staging_directory(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
