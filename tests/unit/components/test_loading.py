"""A project's definitions are built once in a process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mllm_assets.components.instance.location import Location
from mllm_assets.components.loading import forget, load_once

COUNTED = """from pathlib import Path
import dagster as dg
{imports}

@dg.definitions
def defs():
    with Path(__file__).with_name("built").open("a") as file:
        file.write("x")
    {state}
    return dg.Definitions(assets=[dg.AssetSpec(path.stem) for path in Path(__file__).parents[2].glob("configs/*")])
"""
IMPORTS = "from dagster._core.definitions.definitions_load_context import DefinitionsLoadContext"
STATE = "DefinitionsLoadContext.get().get_defs_key_state_info('of_a_component')"
DEFINITIONS = Path(__file__).parents[3] / "mllm_assets" / "definitions.py"


def write_project(root: Path, *, imports: str = "", state: str = "") -> Path:
    package = root / f"loaded_{root.parent.name.replace('-', '_')}_{root.name}"
    (package / "defs").mkdir(parents=True)
    for folder in (package, package / "defs"):
        (folder / "__init__.py").touch()
    (package / "definitions.py").write_text(DEFINITIONS.read_text())
    (package / "defs" / "counted.py").write_text(COUNTED.format(imports=imports, state=state))
    (root / "pyproject.toml").write_text(
        f'[tool.dg]\ndirectory_type = "project"\n[tool.dg.project]\nroot_module = "{package.name}"\n'
    )
    return package


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    forget()


def num_built(package: Path) -> int:
    return len((package / "defs" / "built").read_text())


def test_a_command_builds_the_definitions_once(root: Path) -> None:
    """Each of the five times that Dagster asked for them took 0.2 s."""
    package = write_project(root)
    Location(root)
    assert load_once(package) is load_once(package)
    assert num_built(package) == 1


def test_what_was_added_to_the_project_is_there_for_the_next_command_of_a_process(root: Path) -> None:
    write_project(root)
    assert Location(root).keys == {} and not Location(root).repository.assets_defs_by_key
    (root / "configs").mkdir()
    (root / "configs" / "new.yaml").touch()
    assert [key.to_user_string() for key in Location(root).repository.asset_graph.get_all_asset_keys()] == ["new"]


def test_a_component_with_a_state_of_its_own_is_asked_at_each_load(root: Path) -> None:
    """Dagster notes during a load which states it used, and hands those to the processes of the runs."""
    package = write_project(root, imports=IMPORTS, state=STATE)
    assert load_once(package) is not load_once(package)
    assert num_built(package) == 2


RUN = """
import os
import sys
from pathlib import Path
import dagster as dg
from mllm_assets.components.instance.location import Location

with dg.instance_for_test() as instance:
    result = dg.execute_job(Location(Path(sys.argv[1])).job("__ASSET_JOB"), instance=instance)
    assert result.success
    pids = {dict(event.event_specific_data.metadata)["pid"].value for event in result.all_events
            if event.event_type_value == "STEP_WORKER_STARTED"}
    assert len(pids) == 4, pids
print(os.getpid())
"""
CHAIN = """from pathlib import Path
import dagster as dg
from mllm_assets.components.instance.step_forks import run_pid

def made_of(number):
    @dg.asset(name=f"asset_{number}", deps=[f"asset_{number - 1}"] if number else [])
    def asset():
        with Path(__file__).with_name("runs").open("a") as file:
            file.write(f"{run_pid()}\\n")
    return asset

assets = [made_of(number) for number in range(4)]
"""


@pytest.mark.slow
@pytest.mark.not_fast
def test_the_processes_of_a_runs_steps_do_not_build_the_definitions_again(root: Path) -> None:
    """With 500 datasets and recipes that took 24 CPU-seconds in each."""
    package = write_project(root)
    (package / "defs" / "chain.py").write_text(CHAIN)
    command = [sys.executable, "-c", RUN, str(root)]
    path = os.pathsep.join([str(root), *sys.path])
    run = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": path}, check=True, stdout=subprocess.PIPE, text=True
    )
    assert num_built(package) == (2 if sys.platform == "linux" else 5), "in the run's process and in the forks' parent"
    asked = (package / "defs" / "runs").read_text().split()
    assert asked == 4 * [run.stdout.split()[-1]], "a step ends when its run's process is gone, which is not its parent"
