"""`mllm-assets doctor` on machines that are really broken."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import duckdb
import pytest
from dagster._core.events import EngineEventData
from dagster._core.storage.tags import GRPC_INFO_TAG
from packaging.requirements import Requirement

from mllm_assets.components.instance.doctor import _check_instance, check_dagster
from mllm_assets.components.slots import HOST_TAG, end_dead_runs
from mllm_assets.layout import Layout
from mllm_assets.operations import machine
from mllm_assets.operations.findings import Finding
from mllm_assets.operations.machine import HubModel, check_hub
from mllm_assets.operations.processes import check_database, check_orphans
from mllm_assets.worker import supervisor
from tests.integration.conftest import REPOSITORY, wait_for
from tests.integration.stand_in_hub import GOOD_TOKEN, OTHER_TOKEN, Repo, running_hub

pytestmark = pytest.mark.integration


def test_a_folder_that_this_user_may_not_write_is_named_with_what_to_do(tmp_path: Path) -> None:
    """Root may write everywhere, so that somebody else looks where the tests run as root."""
    layout = Layout(tmp_path / "root")
    layout.data.mkdir(parents=True)
    layout.data.chmod(0o555)
    tmp_path.chmod(0o755)
    finding = as_nobody(layout)
    assert finding.status == "fail"
    assert str(layout.data) in finding.detail and "Permission denied" in finding.detail
    assert "chown" in finding.next_step and "MLLM_ASSETS_ROOT" in finding.next_step


def as_nobody(layout: Layout) -> Finding:
    if os.geteuid() != 0:
        return machine.check_write_access(layout)
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def look() -> None:
        os.setgroups([])
        os.setuid(65534)
        sender.send(machine.check_write_access(layout))

    process = multiprocessing.get_context("fork").Process(target=look)
    process.start()
    assert receiver.poll(30)
    process.join(30)
    return receiver.recv()


def test_a_file_in_the_place_of_a_folder_is_no_folder_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    finding = machine.check_write_access(Layout(tmp_path))
    assert (finding.status, finding.detail) == ("fail", f"{tmp_path / 'data'}: Not a directory")


def test_a_root_that_is_not_there_yet_is_fine_and_stays_away(tmp_path: Path) -> None:
    assert machine.check_write_access(Layout(tmp_path / "new")).status == "ok"
    assert machine.check_disk(tmp_path / "new").detail.endswith(f"free at {tmp_path / 'new'}")
    assert list(tmp_path.iterdir()) == []


def test_a_version_out_of_range_and_a_missing_package_are_named() -> None:
    found = machine._version("duckdb")
    assert machine._unmet(Requirement("duckdb>=99")) == f"duckdb is {found}, expected >=99"
    assert machine._unmet(Requirement("no-such-package")) == "no-such-package is missing, expected any version"
    assert machine._unmet(Requirement('no-such-package; extra == "ray"')) is None
    assert machine._unmet(Requirement("duckdb>=2")) is None
    [finding] = machine.check_versions()
    assert "python 3." in finding.detail and "torch " in finding.detail


def test_a_pool_without_a_limit_fails_and_says_which_line_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where DAGSTER_HOME lies elsewhere the dagster.yaml of the project is not read, and the limit silently gone."""
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    assert {f.check: f for f in _check_instance(REPOSITORY)}["pool gpu"] == Finding(
        "pool gpu",
        "fail",
        "no limit is configured, so two trainings would share the device",
        f"Put `concurrency: {{pools: {{default_limit: 1}}}}` into {tmp_path / 'dagster.yaml'}.",
    )
    shutil.copy(REPOSITORY / "dagster.yaml", tmp_path)
    assert {f.check: f.status for f in _check_instance(REPOSITORY)} == {
        "instance": "ok", "pool gpu": "ok", "slots": "ok",
    }  # fmt: skip


def test_without_a_home_the_dagster_yaml_of_the_folder_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    assert [f.status for f in _check_instance(REPOSITORY)] == ["warn", "ok"]
    assert [f.status for f in _check_instance(tmp_path)] == ["warn", "fail"]


def test_settings_that_do_not_open_are_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dagster.yaml").write_text("run_monitoring: {enabled: maybe}\n")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    [finding] = _check_instance(REPOSITORY)
    assert (finding.check, finding.status) == ("instance", "fail")
    assert finding.next_step == f"Correct {tmp_path}/dagster.yaml, or start the storage that it names."


def test_slots_of_a_killed_and_of_an_ended_run_are_found_and_slots_free_frees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(REPOSITORY / "dagster.yaml", tmp_path)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with dg.DagsterInstance.get() as instance:
        storage = instance.event_log_storage
        runs = {}
        for status in (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.FAILURE):
            run = instance.create_run_for_job(dg.job(name=status.value.lower())(lambda: None), status=status)
            instance.report_engine_event("", run, EngineEventData({"pid": dg.MetadataValue.text(str(gone.pid))}))
            runs[status] = run.run_id
        storage.set_concurrency_slots("gpu", 2)
        for run_id in runs.values():
            assert storage.claim_concurrency_slot("gpu", run_id, "emoji_sft__checkpoint").is_claimed
        started, ended = (run_id[:8] for run_id in runs.values())

        finding = {f.check: f for f in _check_instance(REPOSITORY)}["slots"]
        assert (finding.status, finding.next_step) == ("warn", "mllm-assets slots free")
        assert finding.detail == (
            f"killed and still counted as running: {started}; ended and still holding a slot: {ended}"
        )

        assert sorted(end_dead_runs(instance)) == sorted(runs.values())
        assert storage.get_concurrency_info("gpu").claimed_slots == []
        assert {f.check: f.status for f in _check_instance(REPOSITORY)}["slots"] == "ok"


@pytest.mark.parametrize(
    ("tags", "is_judged"),
    [
        ({}, True),
        ({HOST_TAG: socket.gethostname()}, True),
        ({HOST_TAG: "another-machine"}, False),
        ({GRPC_INFO_TAG: '{"host": "localhost", "port": 4000}'}, True),
        ({GRPC_INFO_TAG: '{"host": "192.0.2.1", "port": 4000}'}, False),
    ],
)
def test_a_run_of_another_machine_is_not_ended_for_its_pid_being_gone_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tags: dict[str, str], is_judged: bool
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with dg.DagsterInstance.get() as instance:
        run = instance.create_run_for_job(dg.job(name="train")(lambda: None), status=dg.DagsterRunStatus.STARTED)
        instance.report_engine_event("", run, EngineEventData({"pid": dg.MetadataValue.text(str(gone.pid))}))
        instance.add_run_tags(run.run_id, tags)
        assert end_dead_runs(instance) == ([run.run_id] if is_judged else [])


def test_the_process_that_holds_the_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "quality.duckdb"
    assert check_database(path).detail == "none yet; the first sample_quality makes it"
    duckdb.connect(str(path)).close()
    assert check_database(path).status == "ok"
    code = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True); input()"
    with running([sys.executable, "-c", code, str(path)]) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "open\n"
        finding = check_database(path, sleep=lambda seconds: None)
        assert finding.status == "warn"
        assert f"PID {holder.pid}: {sys.executable} -c import duckdb" in finding.detail
        assert finding.next_step == f"Close it there, or end it: kill {holder.pid}"


def test_a_short_transaction_is_nobodys_fault(tmp_path: Path) -> None:
    path = tmp_path / "quality.duckdb"
    duckdb.connect(str(path)).close()
    connection = duckdb.connect(str(path))
    del connection  # this process is not looked at: it is the one that asks
    code = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True); input()"
    with running([sys.executable, "-c", code, str(path)]) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "open\n"

        def end(seconds: float) -> None:
            holder.communicate(timeout=500)

        assert check_database(path, sleep=end).status == "ok"


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked at in /proc")
def test_a_worker_without_a_supervisor_is_an_orphan_and_one_with_it_is_not() -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(120)"]
    mark = {supervisor.MARK: uuid.uuid4().hex}
    with running(sleeper, **mark) as orphan:
        finding = check_orphans()
        assert finding.status == "warn" and f"PID {orphan.pid}: " in finding.detail
        assert finding.next_step.startswith("kill -9 ") and str(orphan.pid) in finding.next_step.split()
    with running([sys.executable, supervisor.__file__, "1", "-", *sleeper], **mark) as supervised:
        below = wait_for(lambda: supervisor.tree(supervised.pid), "the worker")
        finding = check_orphans()
        shown = finding.next_step.split()
        assert str(supervised.pid) not in shown and str(below[0]) not in shown


@pytest.mark.parametrize(
    ("token", "status", "said"),
    [
        (None, "warn", "The model made/model is gated."),
        (OTHER_TOKEN, "warn", "The model made/model is gated, and the account of HF_TOKEN has no access yet."),
        (GOOD_TOKEN, "ok", "readable; it is fetched when a recipe needs it"),
    ],
)
def test_access_to_a_gated_model_is_asked_of_the_hub_and_the_token_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, status: str, said: str
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    model = HubModel(repo="made/model", revision="main", directory=tmp_path / "pretrains" / "model")
    with running_hub() as hub:
        hub.repos["models/made/model"] = Repo.of({"config.json": b"{}"}, gated=True)
        about_token, about_model = check_hub([model], endpoint=hub.endpoint)
        assert (about_model.status, about_model.detail) == (status, said)
        assert about_token.detail.startswith("is set" if token else "is not set")
        assert token is None or token not in f"{about_token} {about_model}"

        model.directory.mkdir(parents=True)
        (model.directory / "config.json").touch()
        hub.requests.clear()
        assert len(check_hub([model], endpoint=hub.endpoint)) == 1 and not hub.requests  # it is here: nothing to ask


def test_a_token_that_cannot_be_one_fails_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_two words")
    [finding] = check_hub([])
    assert finding.status == "fail" and finding.next_step.startswith("Copy the token again")
    assert "two words" not in finding.detail


def test_a_project_that_does_not_load_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    [definitions, *_], models = check_dagster(tmp_path, Layout(tmp_path))
    assert (definitions.status, models) == ("fail", [])
    assert "names no Dagster project" in definitions.detail


@pytest.mark.slow
def test_the_command_exits_with_1_on_a_fail_and_0_without_and_prints_json(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    broken = doctor(tmp_path, "--json")
    assert broken.returncode == 1, broken.stderr
    findings = {finding["check"]: finding for finding in json.loads(broken.stdout)}
    assert findings["pool gpu"]["status"] == "fail" and findings["pool gpu"]["next_step"]
    assert findings["device"]["detail"].startswith("cpu: ")
    assert findings["definitions"]["status"] == "ok"
    assert findings["Hub: google/gemma-3-4b-it"]["detail"] == "not checked: HF_HUB_OFFLINE is set"
    assert all(finding["next_step"] for finding in findings.values() if finding["status"] != "ok")

    shutil.copy(REPOSITORY / "dagster.yaml", tmp_path)
    sound = doctor(tmp_path)
    assert sound.returncode == 0, sound.stdout
    assert "0 fail" in sound.stdout and "pool gpu" in sound.stdout


def doctor(home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    env = {"DAGSTER_HOME": str(home), "MLLM_ASSETS_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "mllm_assets.cli", "doctor", *options],
        cwd=REPOSITORY, env={**os.environ, **env, "MLLM_ASSETS_ROOT": str(home / "root")},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


@contextmanager
def running(command: list[str], **env: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, env={**os.environ, **env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.communicate()
