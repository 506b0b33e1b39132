"""What launcher and worker say to each other."""

import gc
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mllm_assets import errors, worker
from mllm_assets.errors import MllmAssetsError
from mllm_assets.training.launch import WorkerCrashed, run_worker
from mllm_assets.training.protocol import EXIT_USER_ERROR, Reporter, error_from_payload, error_payload


def test_progress_is_throttled_but_the_first_and_the_last_pass() -> None:
    """Each message becomes a row in Dagster's database."""
    sent: list[dict[str, Any]] = []
    reporter = Reporter(emit=sent.append, min_interval_s=3600)
    for step in range(1, 101):
        reporter.progress("training", step, 100, loss=1 / step)
    assert [message["done"] for message in sent] == [1, 100]
    assert sent[1]["text"] == "training 100/100, loss 0.01"
    assert sent[1]["loss"] == 0.01 and sent[1]["stage"] == "training" and sent[1]["elapsed_s"] >= 0


def test_each_stage_reports_at_once() -> None:
    sent: list[dict[str, Any]] = []
    reporter = Reporter(emit=sent.append, min_interval_s=3600)
    for stage in ("loading", "training"):
        reporter.progress(stage, 1, 9)
    assert [message["stage"] for message in sent] == ["loading", "training"]


def test_a_warning_is_said_once_everywhere_and_kept() -> None:
    sent: list[dict[str, Any]] = []
    stream = io.StringIO()
    reporter = Reporter(emit=sent.append, stream=stream)
    reporter.warn("checkpoint-3 is damaged")
    reporter.warn("checkpoint-3 is damaged")
    assert reporter.warnings == ["checkpoint-3 is damaged"]
    assert [message["warning"] for message in sent] == ["checkpoint-3 is damaged"]
    assert stream.getvalue() == "warning: checkpoint-3 is damaged\n"


def test_the_bar_shows_stage_count_and_facts() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream=stream)
    reporter.progress("training", 5, 5, loss=0.123456)
    reporter.close()
    assert "training" in stream.getvalue() and "5/5" in stream.getvalue() and "loss=0.1235" in stream.getvalue()


@pytest.mark.parametrize("name", [name for name in vars(errors) if name.endswith("Error")])
def test_every_error_class_crosses_the_process_border(name: str) -> None:
    error = getattr(errors, name)("what and how")
    again = error_from_payload(json.loads(json.dumps(error_payload(error))))
    assert type(again) is type(error) and str(again) == "what and how"


def test_the_bar_of_a_resumed_run_begins_at_its_step_and_counts_what_is_done_now() -> None:
    """It began at 0, so that a resume at step 900 showed 900 steps in the first second."""
    shown = io.StringIO()
    reporter = Reporter(stream=shown)
    reporter.progress("train", 900, 1000)
    assert reporter._bar.format_dict["initial"] == reporter._bar.n == 900
    reporter.progress("train", 1000, 1000)
    reporter.close()
    assert "train: 100%" in shown.getvalue() and shown.getvalue().endswith("\n")


def test_what_follows_a_killed_workers_bar_begins_a_new_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The error stuck to the bar: `train:  3/9error: The worker ...`."""
    (tmp_path / "killed_tasks.py").write_text(
        "import os\ndef killed(request, reporter):\n    reporter.progress('train', 3, 9)\n    os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(WorkerCrashed):
        run_worker({"task": "killed_tasks:killed"})
    shown = capfd.readouterr().err
    assert "train:  33%" in shown and shown.endswith("\n")


def test_the_worker_writes_a_users_error_and_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "border_tasks.py").write_text(
        "from mllm_assets.errors import DataError\n"
        "def bad(request, reporter): raise DataError('row 7')\n"
        "def good(request, reporter): return {'sum': sum(request['numbers'])}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = tmp_path / "result.json"
    assert worker.run({"task": "border_tasks:bad"}, result) == EXIT_USER_ERROR
    assert json.loads(result.read_text()) == {"error": {"type": "DataError", "message": "row 7"}}
    assert worker.run({"task": "border_tasks:good", "numbers": [1, 2]}, result) == 0
    assert json.loads(result.read_text()) == {"result": {"sum": 3}}


def test_a_ranks_crash_does_not_hide_another_ranks_error(tmp_path: Path) -> None:
    """When one rank ends, the others fall over a broken connection: that is not what the person must read."""
    (tmp_path / "falling_tasks.py").write_text("def fall(request, reporter): raise ConnectionError('peer is gone')\n")
    request, result = tmp_path / "request.json", tmp_path / "result.json"
    request.write_text(json.dumps({"task": "falling_tasks:fall"}))
    command = [sys.executable, "-m", "mllm_assets.worker", str(request), str(result)]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}

    assert subprocess.run(command, env=env, capture_output=True).returncode == 1
    assert "ConnectionError: peer is gone" in json.loads(result.read_text())["traceback"]

    result.write_text('{"error": {"type": "DataError", "message": "row 7"}}')
    assert subprocess.run(command, env=env, capture_output=True).returncode == 1
    assert json.loads(result.read_text())["error"]["message"] == "row 7"


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="Unknown task 'trian': expected one of build_pretrained, train,"):
        worker.find_task("trian")


def test_garbage_is_collected_again_once_the_libraries_of_a_task_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_to_load.py").write_text(
        "import gc\ncollected = gc.isenabled()\n\ndef task(request, reporter):\n    return collected\n"
    )
    (tmp_path / "broken.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    assert worker.find_task("slow_to_load:task")({}, Reporter()) is False  # while it was loaded
    with pytest.raises(ModuleNotFoundError):
        worker.find_task("broken:task")
    assert gc.isenabled()


def test_only_people_errors_are_people_errors() -> None:
    assert all(issubclass(getattr(errors, name), MllmAssetsError) for name in vars(errors) if name.endswith("Error"))


@pytest.mark.parametrize(("bits", "is_found"), [(4, True), (None, False)])
def test_bitsandbytes_is_left_out_of_a_process_that_does_not_quantise(
    tmp_path: Path, bits: int | None, is_found: bool
) -> None:
    """PEFT imports it wherever it is found: a fifth of the time that a worker takes to start."""
    (tmp_path / "bitsandbytes.py").touch()
    (tmp_path / "looking.py").write_text(
        "from importlib.util import find_spec\n"
        "def look(request, reporter): return {'is_found': find_spec('bitsandbytes') is not None}\n"
    )
    request, result = tmp_path / "request.json", tmp_path / "result.json"
    request.write_text(json.dumps({"task": "looking:look", "recipe": {"quantization_bit": bits}}))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "mllm_assets.worker", str(request), str(result)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)
    assert json.loads(result.read_text())["result"] == {"is_found": is_found}
