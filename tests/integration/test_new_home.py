"""A new DAGSTER_HOME that several commands open for the first time at once."""

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from mllm_assets.components.instance.home import InstanceError, open_instance
from tests.integration.conftest import REPOSITORY, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow]

# Opens each folder as soon as its `go` is there
OPEN = """
import os, sys, time
from pathlib import Path
from mllm_assets.components.instance.home import open_instance
Path(sys.argv[1], "ready", str(os.getpid())).touch()
for home in map(Path, sys.argv[2:]):
    while not (home / "go").exists():
        time.sleep(0.0005)
    os.environ["DAGSTER_HOME"] = str(home)
    with open_instance() as instance:
        (home / f"opened.{os.getpid()}").write_text(str(instance.get_runs_count()))
"""


def new_home(path: Path) -> Path:
    path.mkdir()
    shutil.copy(REPOSITORY / "dagster.yaml", path)
    return path


def test_commands_that_open_a_new_home_at_once_all_open_it(tmp_path: Path) -> None:
    """Dagster makes its tables at the first opening: of three at once, one failed in three of four tries."""
    homes = [new_home(tmp_path / str(number)) for number in range(4)]
    (tmp_path / "ready").mkdir()
    command = [sys.executable, "-c", OPEN, str(tmp_path), *map(str, homes)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    wait_for(lambda: len(list((tmp_path / "ready").iterdir())) == 3, "three processes")
    for home in homes:
        (home / "go").touch()
        time.sleep(1)
    assert [(process.wait(120), process.communicate()[1][-500:]) for process in processes] == [(0, "")] * 3
    assert all(len(list(home.glob("opened.*"))) == 3 for home in homes)


def test_a_home_that_two_processes_spoilt_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster's own commands do not wait for each other."""
    home = new_home(tmp_path / "home")
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    with open_instance():
        pass
    with closing(sqlite3.connect(home / "schedules" / "schedules.db")) as database:
        [(version,)] = database.execute("select version_num from alembic_version").fetchall()
        database.executescript(
            "alter table alembic_version rename to old; create table alembic_version (version_num text);"
            f"insert into alembic_version values ('{version}'), ('{version}')"
        )
    with pytest.raises(InstanceError, match=r"two processes opened it.*remove everything in it but dagster\.yaml"):
        with open_instance():
            pass
    for path in home.iterdir():
        if path.name != "dagster.yaml":
            shutil.rmtree(path) if path.is_dir() else os.remove(path)
    with open_instance() as instance:
        assert instance.get_runs_count() == 0
