"""Experiment trackers that `report_to` names, beside TensorBoard, which is always written.

The trackers' own settings count, such as MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, WANDB_PROJECT and WANDB_MODE. A
run that is resumed goes on under the id that it began with. Without MLFLOW_TRACKING_URI MLflow keeps a recipe's runs in
`mlflow.db` beside them: `mlflow ui --backend-store-uri sqlite:///outputs/<recipe>/mlflow.db` shows it.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mllm_assets.errors import MachineError
from mllm_assets.training.run_file import keep_for_life, read_run_file
from mllm_assets.training.spec import TrainSpec

SQLITE = "sqlite:///"
RUN_ID_VARIABLES = {
    "mlflow": {"MLFLOW_RUN_ID": "{run_id}"},
    "wandb": {"WANDB_RUN_ID": "{run_id}", "WANDB_RESUME": "allow"},
}


def start(spec: TrainSpec, run_dir: Path) -> list[str]:
    """Return the trackers for `TrainingArguments.report_to`, set up to go on with the ids that the run has.

    Raises:
        MachineError: A tracker's package is not installed.
    """
    names = list(spec.trackers)
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MachineError(
                f"The recipe's report_to names {name}, which is not installed. Install it (pip install {name}), or set "
                f"report_to: tensorboard."
            )
    if "mlflow" in names:  # its own default is a file in the working directory
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"{SQLITE}{(run_dir.parent / 'mlflow.db').resolve()}")
    for name, tracked in read_run_file(run_dir).get("trackers", {}).items():
        for variable, value in RUN_ID_VARIABLES[name].items():
            os.environ[variable] = value.format(run_id=tracked["run_id"])
    return names


class KeepsRunIds(TrainerCallback):
    """Writes down, as soon as the trackers have begun, under which ids and where."""

    def __init__(self, run_dir: Path, names: list[str]) -> None:
        self.run_dir = run_dir
        self.names = names

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        keep_for_life(self.run_dir, "trackers", {name: _FACTS[name]() for name in self.names})


def tracked(run_dir: Path) -> dict[str, dict[str, str]]:
    """Return `run_id` and `url` (of the run's page, or the folder or database it is in) by tracker."""
    return read_run_file(run_dir).get("trackers", {})


def _mlflow_run() -> dict[str, str]:
    import mlflow

    run = mlflow.active_run()
    assert run is not None, "MLflowCallback has begun a run"
    server, experiment_id, run_id = mlflow.get_tracking_uri(), run.info.experiment_id, run.info.run_id
    if server.startswith(SQLITE):
        return {"run_id": run_id, "url": server.removeprefix(SQLITE)}
    is_server = server.startswith(("http://", "https://"))
    page = f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    return {"run_id": run_id, "url": page if is_server else f"{server}/{experiment_id}/{run_id}"}


def _wandb_run() -> dict[str, str]:
    import wandb

    run = wandb.run
    assert run is not None, "WandbCallback has begun a run"
    return {"run_id": run.id, "url": run.url or run.dir}


_FACTS = {"mlflow": _mlflow_run, "wandb": _wandb_run}
