"""Dagster's storage on a real Postgres: two processes write at once, and the pools still count."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml

from tests.integration.conftest import REPOSITORY, Project, make_project
from tests.integration.postgres_server import PostgresServer, find_postgres, postgres_server

pytest.importorskip("dagster_postgres", reason="the extra postgres is not installed")
pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]

IN_TURN = """import time

import dagster as dg


def make(name):
    @dg.asset(name=name, pool="gpu")
    def held() -> dg.MaterializeResult:
        started = time.time()
        time.sleep(3)
        return dg.MaterializeResult(metadata={"started": started, "ended": time.time()})

    return held


first, second = make("first"), make("second")
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    binaries = find_postgres()
    if binaries is None:
        pytest.skip("no Postgres server is installed: make postgres")
    with postgres_server(binaries) as server:
        yield server


@pytest.fixture
def on_postgres(postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    project = make_project(tmp_path / "project")
    project.write_recipe("mine")
    (project.root / project.package / "defs" / "in_turn.py").write_text(IN_TURN)
    settings = yaml.safe_load((REPOSITORY / "deploy" / "dagster-postgres.yaml").read_text())
    settings["storage"]["postgres"]["postgres_db"]["port"] = postgres.port
    (project.home / "dagster.yaml").write_text(yaml.safe_dump(settings))
    for name, value in postgres.env.items():
        monkeypatch.setenv(name, value)
    with dg.DagsterInstance.from_config(str(project.home)) as instance:
        instance.event_log_storage.set_concurrency_slots("gpu", 1)  # as the page says: two that enter it at once fail
    return project


def test_two_runs_at_once_are_recorded_whole_and_take_turns_at_the_gpu(on_postgres: Project) -> None:
    project = on_postgres
    selections = ['key:"first" or key:"emoji/raw"', 'key:"second"']
    runs = [project.materialize(selection, executor="multiprocess") for selection in selections]
    outputs = [run.communicate(timeout=500)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(outputs)
    assert not any("planted" in output for output in outputs), "the password is in no log"

    times = sorted((project.metadata(name)["started"], project.metadata(name)["ended"]) for name in ("first", "second"))
    assert times[0][1] <= times[1][0], "pool `gpu` lets one step run at a time, whichever process it is of"
    assert project.metadata("emoji", "raw")["num_samples"] == 800
    with dg.DagsterInstance.from_config(str(project.home)) as instance:
        assert type(instance.event_log_storage).__name__ == "PostgresEventLogStorage"
        assert type(instance.run_storage).__name__ == "PostgresRunStorage"
        assert instance.event_log_storage.get_concurrency_info("gpu").slot_count == 1
        records = instance.get_run_records()
        assert [record.dagster_run.status for record in records] == [dg.DagsterRunStatus.SUCCESS] * 2
        keys = ["first", "second", "emoji/raw"]
        events = [instance.get_latest_materialization_event(dg.AssetKey(key.split("/"))) for key in keys]
        assert {event.run_id for event in events if event} == {record.dagster_run.run_id for record in records}
