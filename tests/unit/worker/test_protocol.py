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

from mllm_assets import errors
from mllm_assets.errors import MllmAssetsError
from mllm_assets.worker import run as worker
from mllm_assets.worker.launch import WorkerCrashed, read_outcome, run_worker
from mllm_assets.worker.protocol import EXIT_USER_ERROR, LOST_PEER, Reporter, error_from_payload, error_payload
from mllm_assets.worker.tasks import to_json
from tests.fake_tasks import FakeTask

ROOT = Path(__file__).parents[3]


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


def test_what_follows_a_killed_workers_bar_begins_a_new_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The error stuck to the bar: `train:  3/9error: The worker ...`."""
    with pytest.raises(WorkerCrashed):
        run_worker(FakeTask(what="killed", folder=tmp_path), env={"PYTHONPATH": str(ROOT)})
    shown = capfd.readouterr().err
    assert "train:  33%" in shown and shown.endswith("\n")


def test_the_worker_writes_a_users_error_and_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # the worker leaves it out, in this process too
    path, result = tmp_path / "task.json", tmp_path / "result.json"
    path.write_text(json.dumps(to_json(FakeTask(what="wrong", folder=tmp_path))))
    assert worker.run_file(path, result) == EXIT_USER_ERROR
    error = {"type": "MachineError", "message": "No CUDA device. Set device: cpu."}
    assert json.loads(result.read_text()) == {"error": error}
    path.write_text(json.dumps(to_json(FakeTask(what="reports", folder=tmp_path))))
    assert worker.run_file(path, result) == 0
    assert json.loads(result.read_text())["result"] == {"done": True}


def test_a_ranks_crash_does_not_hide_another_ranks_error(tmp_path: Path) -> None:
    """When one rank ends, the others fall over a broken connection: that is not what the person must read."""
    path, result = tmp_path / "task.json", tmp_path / "result.json"
    path.write_text(json.dumps(to_json(FakeTask(what="crash", folder=tmp_path))))
    command = [sys.executable, "-m", "mllm_assets.worker", str(path), str(result)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    assert subprocess.run(command, env=env, capture_output=True).returncode == 1
    assert "ZeroDivisionError: one over zero" in json.loads(result.read_text())["traceback"]

    result.write_text('{"error": {"type": "DataError", "message": "row 7"}}')
    assert subprocess.run(command, env=env, capture_output=True).returncode == 1
    assert json.loads(result.read_text())["error"]["message"] == "row 7"


def test_garbage_is_collected_again_once_the_libraries_of_a_task_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_to_load.py").write_text(
        "import gc\ncollected = gc.isenabled()\n\ndef task(task, reporter):\n    return collected\n"
    )
    (tmp_path / "broken.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)

    class Slow(FakeTask):
        entry = "slow_to_load:task"

    class Broken(FakeTask):
        entry = "broken:task"

    task = Slow(what="", folder=tmp_path)
    assert worker.find_function(task.entry)(task, Reporter()) is False  # while it was loaded
    with pytest.raises(ModuleNotFoundError):
        worker.find_function(Broken.entry)
    assert gc.isenabled()


def test_a_task_from_outside_imports_what_it_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this package's tasks do without counted as not installed for all."""
    (tmp_path / "outside.py").write_text("import tabnanny\n\ndef task(task, reporter):\n    return tabnanny.__name__\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(worker, "NOT_NEEDED", ("tabnanny",))
    assert worker.find_function("outside:task")(FakeTask(what="", folder=tmp_path), Reporter()) == "tabnanny"


def test_only_people_errors_are_people_errors() -> None:
    assert all(issubclass(getattr(errors, name), MllmAssetsError) for name in vars(errors) if name.endswith("Error"))


@pytest.mark.parametrize(("bits", "is_found"), [(4, True), (None, False)])
def test_bitsandbytes_is_left_out_of_a_process_that_does_not_quantise(
    tmp_path: Path, bits: int | None, is_found: bool
) -> None:
    """PEFT imports it wherever it is found: a fifth of the time that a worker takes to start."""
    (tmp_path / "bitsandbytes.py").touch()
    path, result = tmp_path / "task.json", tmp_path / "result.json"
    path.write_text(json.dumps(to_json(FakeTask(what="looks_for_bitsandbytes", folder=tmp_path, bits=bits))))
    command = [sys.executable, "-m", "mllm_assets.worker", str(path), str(result)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, check=True)
    assert json.loads(result.read_text())["result"] == {"is_found": is_found}


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (265, "4 min 25 s"), (11_530, "3 h 12 min")]
)
def test_a_line_of_progress_says_the_losses_and_what_is_left_in_words(seconds: float, shown: str) -> None:
    """`samples_per_s 25.83, time_left_s 239.1, eval_loss 4.775, loss 6.214` had to be worked out by its reader."""
    sent: list[dict] = []
    Reporter(emit=sent.append).progress(
        "train", 14, 400, samples_per_s=25.83, time_left_s=seconds, eval_loss=4.775, loss=6.214
    )
    assert sent[0]["text"] == f"train 14/400, loss 6.214, eval 4.775, 25.83 samples/s, {shown} left"
    assert sent[0]["loss"] == 6.214, "the figures stay figures"


@pytest.mark.parametrize(
    ("text", "num_ranks", "is_lost"),
    [
        ("[.../gloo/transport/tcp/pair.cc:534] Connection closed by peer [192.0.2.2]:4711", 2, True),
        ("[.../gloo/transport/tcp/pair.cc:534] Connection closed by peer [192.0.2.2]:4711", 1, False),
        ("mat1 and mat2 shapes cannot be multiplied", 2, False),
    ],
)
def test_a_rank_whose_peer_is_gone_did_nothing_wrong_so_the_step_is_tried_again(
    text: str, num_ranks: int, is_lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a machine is lost, the others' exception comes first, and an exception was never tried again."""
    monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
    monkeypatch.setattr(worker, "find_function", lambda entry: lambda task, reporter: raises(RuntimeError(text)))
    task_path, result_path = tmp_path / "task.json", tmp_path / "result.json"
    task = FakeTask(what="fail", folder=tmp_path, bits=8)
    task_path.write_text(json.dumps(to_json(task)))
    code = worker.run_file(task_path, result_path)
    with pytest.raises(WorkerCrashed) as crash:
        read_outcome(task, code, result_path)
    assert crash.value.is_transient == is_lost
    assert (LOST_PEER in str(crash.value)) == is_lost and ("Traceback" in str(crash.value)) != is_lost


def raises(error: Exception) -> None:
    raise error
