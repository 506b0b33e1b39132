"""A Dagster project of its own in a temporary folder, made of the same components: real files, real subprocesses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from filelock import FileLock

from mllm_assets.components.facts import facts_of
from mllm_assets.layout import Layout
from tests.integration.stand_in_hub import StandInHub, running_hub
from tests.processes import kill, processes_of

REPOSITORY = Path(__file__).parents[2]
EVERYTHING_PASSES = {
    "min_loss_gain_nats": -99,
    "min_answer_gain": -1,
    "min_image_gain_nats": -99,
    "max_regression_nats": 99,
}
# In a project's `defs` folder: one process for all steps of a run, two seconds less for each
IN_PROCESS = """import dagster as dg


@dg.definitions
def defs():
    return dg.Definitions(executor=dg.in_process_executor)
"""
RECIPE = {
    "model_name_or_path": "pretrains/gemma3_tiny",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "freeze_vision_tower": False,
    "freeze_multi_modal_projector": False,
    "dataset_dir": "data",
    "dataset": "emoji_train",
    "eval_dataset": "emoji_val",
    "template": "gemma3",
    "cutoff_len": 512,
    "logging_steps": 1,
    "save_steps": 3,
    "save_total_limit": 2,
    "per_device_train_batch_size": 8,
    "learning_rate": 1.0e-3,
    "lr_scheduler_type": "cosine",
    "max_steps": 24,
    "seed": 42,
}


def hear_interrupts() -> None:
    """For `preexec_fn`: what a shell starts in the background ignores Ctrl-C, and so do the children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Project:
    """A project folder with the emoji dataset and the tiny Gemma 3, and the ways to run it."""

    root: Path
    package: str
    home: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def layout(self) -> Layout:
        return Layout(self.root)

    @property
    def env(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.root), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "DAGSTER_HOME": str(self.home), "PYTHONPATH": path, "COLUMNS": "200"}

    def write_recipe(self, name: str, **values: Any) -> None:
        recipe = {**RECIPE, "output_dir": f"outputs/{name}", **values}
        recipe = {key: value for key, value in recipe.items() if value is not None}
        (self.root / "configs").mkdir(exist_ok=True)
        (self.root / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))

    def set_defaults(self, *, gates: Mapping[str, float], **others: Any) -> None:
        """Set the gates of every recipe and other defaults, and evaluate on few samples and tokens."""
        path = self.root / self.package / "defs" / "recipes" / "defs.yaml"
        component = yaml.safe_load(path.read_text())
        evaluation = {"max_new_tokens": 8, "max_samples": 24}
        component["attributes"]["defaults"] = {"gates": dict(gates), "evaluation": evaluation, **others}
        path.write_text(yaml.safe_dump(component))

    def set_split(self, **split: Any) -> None:
        """Declare another split of the emoji data; the next run makes it."""
        path = self.root / self.package / "defs" / "datasets" / "emoji" / "defs.yaml"
        component = yaml.safe_load(path.read_text())
        component["attributes"]["split"] = split
        path.write_text(yaml.safe_dump(component))

    def start(self, module: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a module's command in the project; it is ended with the test."""
        return self.start_python("-m", module, *arguments)

    def start_python(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.root,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=hear_interrupts,
        )
        self.processes.append(process)
        return process

    def materialize(
        self, selection: str, config: Mapping[str, Any] | None = None, *, executor: str = "in_process"
    ) -> subprocess.Popen[str]:
        """Start `dagster asset materialize`; one process for all steps saves two seconds a step."""
        options = json.dumps({"execution": {"config": {executor: {}}}, **(config or {})})
        command = ["dagster", "asset", "materialize", "-m", f"{self.package}.definitions", "--select", selection]
        return self.start(*command, "--config-json", options)

    def made(self, selection: str, config: Mapping[str, Any] | None = None) -> str:
        """Materialise, wait, and return the output."""
        process = self.materialize(selection, config)
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output
        return output

    def metadata(self, *key: str) -> dict[str, Any]:
        """The metadata of an asset's latest materialisation."""
        with dg.DagsterInstance.from_config(str(self.home)) as instance:
            event = instance.get_latest_materialization_event(dg.AssetKey(list(key)))
            assert event is not None and event.asset_materialization is not None, f"{key} was never materialised"
            return facts_of(event.asset_materialization.metadata)

    def made_assets(self) -> list[dg.AssetKey]:
        with dg.DagsterInstance.from_config(str(self.home)) as instance:
            return [key for key in instance.get_asset_keys() if instance.get_latest_materialization_event(key)]

    def run_manifest(self, recipe: str) -> dict[str, Any]:
        """Of the latest run of the recipe as written; of a run with overrides, where that is the only one."""
        path = self.layout.outputs / recipe / "latest" / "manifest.json"
        if not path.exists():
            [path] = self.layout.outputs.glob(f"{recipe}/*/manifest.json")
        return json.loads(path.read_text())


def line_of(recipe: str, last: str = "released_model") -> str:
    """The selection of a recipe's own assets up to `last`, on data and model that are made already."""
    names = ["checkpoint", "predictions", "eval_metrics", "released_model"]
    return " or ".join(f'key:"{recipe}/{name}"' for name in names[: names.index(last) + 1])


def make_project(root: Path) -> Project:
    """Write a project that uses the components from outside their package."""
    package = f"project_{uuid.uuid4().hex[:8]}"
    defs = root / package / "defs"
    for folder in ("datasets/emoji", "pretrained", "recipes"):
        (defs / folder).mkdir(parents=True)
    (root / package / "__init__.py").touch()
    shutil.copy(REPOSITORY / "mllm_assets" / "definitions.py", root / package)
    shipped = REPOSITORY / "mllm_assets" / "defs"
    for name in ("datasets/emoji/defs.yaml", "recipes/defs.yaml", "resources.py"):
        shutil.copy(shipped / name, defs / name)
    (defs / "pretrained" / "defs.yaml").write_text(
        "type: mllm_assets.components.PretrainedModels\n"
        "attributes:\n  models:\n    - {name: gemma3_tiny, kind: tiny_gemma3}\n"
    )
    (root / "pyproject.toml").write_text(
        f'[tool.dg]\ndirectory_type = "project"\n[tool.dg.project]\nroot_module = "{package}"\n'
        f'code_location_name = "{package}"\n'
    )
    home = root / ".dagster_home"
    home.mkdir()
    shutil.copy(REPOSITORY / "dagster.yaml", home)
    return Project(root, package, home)


@pytest.fixture(scope="session")
def emoji_ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emoji dataset and the tiny model, materialised once for all test processes; `project` copies them."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emoji_ready"
    with FileLock(f"{root}.lock"):
        if not root.exists():
            project = make_project(root.with_suffix(".tmp"))
            project.write_recipe("ready")
            project.made('+key:"emoji/dataset_info" or key:"pretrained/gemma3_tiny"')
            project.root.rename(root)
    return root


@pytest.fixture(scope="session")
def line_ready(emoji_ready: Path) -> Path:
    """The same with a recipe `mine` whose assets are all made, from its features to what the Hub would get."""
    root = emoji_ready.with_name("line_ready")
    with FileLock(f"{root}.lock"):
        if not root.exists():
            with copied_project(emoji_ready, root.with_suffix(".tmp")) as project:
                values = {"max_steps": 2, "save_steps": 2, "max_samples": 16, "plot_loss": True}
                project.write_recipe("mine", freeze_vision_tower=True, **values)
                project.set_defaults(gates=EVERYTHING_PASSES, push_to_hub={"repo_id": "me/mine"})
                project.made(f'{line_of("mine")} or key:"mine/vision_features" or key:"mine/hub_model"')
            project.root.rename(root)
    return root


@pytest.fixture
def released(line_ready: Path, tmp_path: Path) -> Iterator[Project]:
    """A project whose recipe `mine` has a release."""
    with copied_project(line_ready, tmp_path / "project") as project:
        yield project


@pytest.fixture
def project(emoji_ready: Path, tmp_path: Path) -> Iterator[Project]:
    """A project whose emoji dataset and tiny model are made already."""
    with copied_project(emoji_ready, tmp_path / "project") as project:
        yield project


@contextmanager
def copied_project(emoji_ready: Path, root: Path) -> Iterator[Project]:
    """A copy of the ready project, whose processes are ended with the block."""
    shutil.copytree(emoji_ready, root, symlinks=True)
    [package] = [path.name for path in root.glob("project_*")]
    (root / "configs" / "ready.yaml").unlink(missing_ok=True)
    project = Project(root, package, root / ".dagster_home")
    try:
        yield project
    finally:  # of a failed test too: a run of thousands of steps would slow down all tests after it
        end_all(root)
        for started in project.processes:
            started.communicate()


def end_all(root: Path) -> None:
    """Kill every process that works in or for a project folder."""
    deadline = time.monotonic() + 30
    while (left := processes_of(root)) and time.monotonic() < deadline:
        kill(left)
        time.sleep(0.05)


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 600) -> Any:
    """Poll until the condition gives something true, and return it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {timeout_s:g} s for {what}")


@pytest.fixture(scope="module")
def hub_server() -> Iterator[StandInHub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def empty_hub(hub_server: StandInHub, monkeypatch: pytest.MonkeyPatch) -> StandInHub:
    """A Hub without repositories, in a process that is not offline, has no token and retries at once."""
    hub_server.forget()
    hub_server.repos = {}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr("mllm_assets.hub.errors.WAITS_S", (0.01,) * 4)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return hub_server
