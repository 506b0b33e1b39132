"""`report_to`: MLflow on a file store, Weights & Biases offline."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_assets.artifacts import read_manifest
from mllm_assets.errors import MachineError
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import to_json
from tests.integration.conftest import Project
from tests.integration.test_train_guards import make_task

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install 'mllm-assets[{package}]'")


@needs("mlflow")
def test_mlflow_gets_the_losses_and_the_checkpoint_links_to_its_run(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    store = project.root / "mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the store that needs no server and no database
    project.write_recipe("mine", max_steps=2, max_samples=16, report_to="mlflow")
    project.made('key:"mine/checkpoint"')
    run_id = Path(project.metadata("mine", "checkpoint")["mlflow_run"]).name
    client = mlflow.MlflowClient(tracking_uri=store.as_uri())
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name.startswith("mine/")
    losses = [point.value for point in client.get_metric_history(run_id, "loss")]
    logged = [json.loads(line) for line in (project.layout.outputs / "mine/latest/trainer_log.jsonl").open()]
    assert losses == [line["loss"] for line in logged] and len(losses) == 2


@needs("mlflow")
def test_without_a_tracking_uri_mlflow_keeps_its_database_beside_the_recipes_runs(
    parity_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appeared in the working directory, mostly the project's root."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run_dir = tmp_path / "outputs" / "r" / "run"
    task = make_task(parity_dir, run_dir, report_to="mlflow", max_steps=1, save_strategy="no")
    (tmp_path / "task.json").write_text(json.dumps(to_json(task)))
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "task.json"), "-1"]
    assert subprocess.run(command, timeout=500).returncode == 0
    assert not {"mlflow.db", "mlruns"} & {path.name for path in (tmp_path / "here").iterdir()}
    database = run_dir.parent / "mlflow.db"
    tracked = read_manifest(run_dir)["trackers"]["mlflow"]
    assert database.is_file() and tracked["url"] == str(database)


TRAIN = """
import json, os, sys
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import from_json

class Killed(Reporter):
    def progress(self, stage, done, total, **facts):
        if stage == "train" and done == int(sys.argv[2]):
            os.kill(os.getpid(), 9)

train_task(from_json(json.load(open(sys.argv[1]))), Killed())
"""


@needs("wandb")
def test_wandb_keeps_its_run_when_a_killed_training_is_resumed(
    parity_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    task = make_task(parity_dir, tmp_path / "run", report_to="wandb", max_steps=2, save_steps=1)
    (tmp_path / "task.json").write_text(json.dumps(to_json(task)))

    def train(kill_at_step: int) -> int:
        command = [sys.executable, "-c", TRAIN, str(tmp_path / "task.json"), str(kill_at_step)]
        return subprocess.run(command, timeout=500).returncode

    assert train(kill_at_step=2) == -signal.SIGKILL
    begun = json.loads((tmp_path / "run" / "run.json").read_text())["trackers"]["wandb"]["run_id"]
    assert train(kill_at_step=-1) == 0
    result = read_manifest(tmp_path / "run")
    assert result["resumed_from_step"] == 1 and result["trackers"]["wandb"]["run_id"] == begun
    parts = {path.name.rsplit("-", 1)[-1] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert parts == {begun}


def test_a_tracker_that_is_not_installed_is_said_before_training(
    parity_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    task = make_task(parity_dir, tmp_path / "run", report_to="wandb", max_steps=1)
    with pytest.raises(MachineError, match="report_to names wandb, which is not installed. Install it .pip install"):
        train_task(task, Reporter())
