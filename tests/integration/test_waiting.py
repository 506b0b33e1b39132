"""A run that waits for a pool's slot says who holds it, and can be stopped while it waits."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import dagster as dg
import psutil
import pytest

from tests.integration.conftest import REPOSITORY, wait_for

pytestmark = pytest.mark.integration

DEFINITIONS = """import dagster as dg
import psutil
from pathlib import Path
from mllm_assets.components.instance.executor import one_line_per_asset
from mllm_assets.components.instance.executor import patient_in_process_executor

@dg.asset(pool="gpu")
def trained() -> dg.MaterializeResult:
    mirrors = [Path(f"/proc/{child.pid}/status") for child in psutil.Process().children()]
    Path("mirrors.txt").write_text("".join(path.read_text() for path in mirrors if path.exists()))
    return dg.MaterializeResult()

job = dg.define_asset_job(
    "demo", selection="*", executor_def=patient_in_process_executor, config={"loggers": {"terminal": {}}}
)
defs = dg.Definitions(assets=[trained], jobs=[job], loggers={"terminal": one_line_per_asset})
"""


def start(tmp_path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dagster", "job", "execute", "-f", "project.py", "-j", "demo"],
        cwd=tmp_path,
        env={**os.environ, "DAGSTER_HOME": str(tmp_path / "home")},
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "stderr.txt").open("w"),
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.slow
def test_a_waiting_run_names_the_holder_sleeps_heeds_sigterm_and_goes_on_when_freed(tmp_path: Path) -> None:
    """Dagster's in-process executor waits in silence, takes a whole core for it, and ignores SIGTERM."""
    (tmp_path / "project.py").write_text(DEFINITIONS)
    (tmp_path / "home").mkdir()
    shutil.copy(REPOSITORY / "dagster.yaml", tmp_path / "home")
    with dg.DagsterInstance.from_config(str(tmp_path / "home")) as instance:
        holder = instance.create_run_for_job(dg.job(name="other")(lambda: None)).run_id
        storage = instance.event_log_storage
        storage.initialize_concurrency_limit_to_default("gpu")
        assert storage.claim_concurrency_slot("gpu", holder, "emoji_sft__checkpoint").is_claimed

        stopped = start(tmp_path)
        said = f"trained waits for a slot of the pool gpu: run {holder[:8]} (other, NOT_STARTED) holds it"
        wait_for(lambda: said in (tmp_path / "stderr.txt").read_text(), "the line")
        process = psutil.Process(stopped.pid)
        before = process.cpu_times()
        with pytest.raises(psutil.TimeoutExpired):
            process.wait(3)
        after = process.cpu_times()
        assert (after.user + after.system) - (before.user + before.system) < 1.0, "it spins"
        stopped.send_signal(signal.SIGTERM)
        assert stopped.wait(300) != 0
        text = (tmp_path / "stderr.txt").read_text()
        assert "for emoji_sft__checkpoint; none of its processes is alive here." in text
        assert text.count("waits for a slot") == 1, "it is said once"

        waiting = start(tmp_path)
        wait_for(lambda: said in (tmp_path / "stderr.txt").read_text(), "the line")
        storage.free_concurrency_slots_for_run(holder)
        assert waiting.wait(300) == 0, (tmp_path / "stderr.txt").read_text()

    blocked = re.findall(r"SigBlk:\s*(\w+)", (tmp_path / "mirrors.txt").read_text())
    heard = [mask for mask in blocked if not int(mask, 16) >> (signal.SIGINT - 1) & 1]
    assert not heard, "Ctrl-C on a terminal ends what mirrors the output, before the last lines and with tracebacks"
    assert len(blocked) == 4 or not Path("/proc/self/status").exists(), "two processes for each of stdout and stderr"
