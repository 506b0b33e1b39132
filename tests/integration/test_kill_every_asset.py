"""Each asset is killed -9 while it works and made again: the line ends with the files of one that was never killed."""

import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from mllm_assets.artifacts import sha256_file
from mllm_assets.components.slots import end_dead_runs
from mllm_assets.evaluation.table import predictions_digest, read_predictions
from tests.integration.conftest import EVERYTHING_PASSES, Project, line_of, make_project, wait_for
from tests.processes import kill, processes_of

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.attack("kill -9"), pytest.mark.timeout(1200)]

ASSETS = [
    'key:"pretrained/gemma3_tiny"',
    'key:"emoji/raw"',
    'key:"emoji/sample_quality"',
    'key:"emoji/corrections"',
    'key:"emoji/train" or key:"emoji/val" or key:"emoji/test"',
    'key:"emoji/dataset_info"',
    'key:"mine/vision_features"',
    'key:"mine/checkpoint"',
    'key:"mine/predictions"',
    'key:"mine/eval_metrics"',
    'key:"mine/released_model"',
]
WHOLE_LINE = " or ".join([*ASSETS[:7], line_of("mine")])


def make_line(root: Path) -> Project:
    project = make_project(root)
    project.write_recipe("mine", max_steps=4, max_samples=16, freeze_vision_tower=True)
    project.set_defaults(gates=EVERYTHING_PASSES)
    with dg.DagsterInstance.from_config(str(project.home)):  # a first opening beside the run's would spoil it
        return project


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    project = make_line(tmp_path_factory.mktemp("victim") / "p")
    yield project
    kill(processes_of(project.root))


def wait_for_a_step(command: subprocess.Popen[str], project: Project) -> None:
    """Wait until the run's first step works, or the command has ended."""
    with dg.DagsterInstance.from_config(str(project.home)) as instance:
        known = set(instance.get_run_ids())

        def works() -> bool:
            time.sleep(0.1)
            new = [run_id for run_id in instance.get_run_ids(limit=2) if run_id not in known]
            return bool(new and instance.all_logs(new[0], dg.DagsterEventType.STEP_START))

        wait_for(lambda: command.poll() is not None or works(), "the first step", 400)


@pytest.mark.parametrize("asset", ASSETS, ids=lambda asset: asset.replace("key:", "").replace('"', ""))
def test_an_asset_that_is_killed_is_made_again(asset: str, victim: Project) -> None:
    """Killed once at a random moment of its work; what the kill leaves behind must not be taken for the result."""
    command = victim.materialize(asset)
    wait_for_a_step(command, victim)
    time.sleep(random.Random(asset).uniform(0, 1.5))
    kill(processes_of(victim.root))
    command.communicate()
    wait_for(lambda: not processes_of(victim.root), "all processes to end")
    with dg.DagsterInstance.from_config(str(victim.home)) as instance:
        end_dead_runs(instance)
    victim.made(asset)


def facts(project: Project) -> dict[str, str]:
    """Digest of each file that holds what was made: entries, pictures, weights, predictions. Times are in none."""
    data, mine = project.layout.data.resolve(), project.layout.outputs / "mine"
    files = [path for name in ("t*.json", "val.json", "images/*") for path in (data / "emoji").resolve().glob(name)]
    files += [data / "dataset_info.json", *data.glob("images/*.png")]
    files += mine.glob("*/model/*.safetensors")
    found = {path.relative_to(project.root).as_posix(): sha256_file(path) for path in files}
    for directory in mine.glob("predictions/*"):
        found[directory.relative_to(project.root).as_posix()] = predictions_digest(read_predictions(directory))
    kinds = {Path(name).suffix for name in found}
    assert kinds == {".json", ".png", ".safetensors", ""}, kinds
    return found


def test_the_line_that_was_killed_everywhere_is_the_one_that_never_was(victim: Project, tmp_path: Path) -> None:
    spared = make_line(tmp_path / "p")
    spared.made(WHOLE_LINE)
    assert facts(victim) == facts(spared)
