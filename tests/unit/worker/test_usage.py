"""What a step says it took."""

import subprocess
import sys

import pytest

from mllm_assets.worker.usage import Usage, measured, of_this_worker, report

BURN = "import time; a = bytearray(200 << 20)\nwhile time.process_time() < 0.5: pass"


def test_the_cpu_time_of_processes_below_counts_ended_or_not() -> None:
    with measured() as usage:
        subprocess.run([sys.executable, "-c", BURN], check=True)
        living = subprocess.Popen([sys.executable, "-c", BURN + "\nprint(1, flush=True)\ntime.sleep(60)"], stdout=-1)
        assert living.stdout is not None and living.stdout.readline()
    living.kill()
    living.communicate()
    assert 0.95 <= usage.cpu_s < 2.0, "the system counts whole ticks of 10 ms"
    assert usage.wall_s > 0.5 and usage.money == 0


def test_a_price_makes_money_of_the_wall_clock() -> None:
    with measured(price_per_hour=7200) as usage:
        sum(range(10**5))
    assert usage.money == pytest.approx(2 * usage.wall_s)
    assert set(usage.as_metadata()) == {
        f"cost_{name}" for name in ("wall_s", "cpu_s", "gpu_s", "peak_memory_gib", "money")
    }
    assert "cost_money" not in Usage(wall_s=1.0).as_metadata()


@pytest.mark.parametrize(("is_elsewhere", "cpu_s"), [(True, 40.0), (False, 0.0)])
def test_what_a_worker_reports_counts_once(is_elsewhere: bool, cpu_s: float) -> None:
    """The CPU time of a worker below this process is this process's already."""
    with measured() as usage:
        report({"cpu_s": 40.0, "gpu_s": 3.0, "peak_memory_gib": 900.0}, is_elsewhere=is_elsewhere)
        report(None, is_elsewhere=is_elsewhere)
    assert usage.cpu_s == pytest.approx(cpu_s, abs=5)
    assert (usage.gpu_s, usage.peak_memory_gib) == (3.0, 900.0)


def test_figures_of_metadata_come_back_and_add_up() -> None:
    one = Usage(wall_s=2.0, cpu_s=3.0, gpu_s=1.0, peak_memory_gib=4.0, money=0.5)
    assert Usage.from_metadata({**one.as_metadata(), "path": "data"}) == one
    one.add(Usage(wall_s=1.0, peak_memory_gib=2.0))
    assert (one.wall_s, one.peak_memory_gib) == (3.0, 4.0)


def test_a_worker_without_a_gpu_held_none() -> None:
    assert of_this_worker(0.0, 2)["gpu_s"] == 0.0
