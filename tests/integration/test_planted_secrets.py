"""Secrets are planted where people keep them; afterwards every byte that was written or printed is searched."""

import json
import secrets
import string
from pathlib import Path

import pytest
import yaml

from mllm_assets.data.quality.store import QualityStore
from mllm_assets.releases.publish import list_releases
from tests.integration.conftest import EVERYTHING_PASSES, Project, line_of
from tests.integration.stand_in_hub import Repo, running_hub

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]

# An asset of the user's own that tells its secrets wherever it can
LEAKY = """import logging
import os
from dataclasses import dataclass

import dagster as dg

from mllm_assets.components.assets.step import step
from mllm_assets.components.resources import AcceleratorResource, ProjectResource
from mllm_assets.worker.tasks import Task

SECRETS = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MLLM_ASSETS_API_KEY", "MLLM_ASSETS_ALERT_WEBHOOK")


def every():
    return " ".join(os.environ[name] for name in SECRETS)


@dataclass(frozen=True, kw_only=True)
class Telling(Task[dict]):
    entry = __name__ + ":told"
    raises: bool


def told(task, reporter):
    print("printed", every())
    logging.getLogger("library").error("logged %s", every())
    reporter.notify(f"said {every()}")
    reporter.warn(f"warned {every()}")
    reporter.progress("leaking", 1, 1)
    if task.raises:
        raise RuntimeError(f"raised {every()}")
    return {}


@dg.asset(key=["leaky", "crashes"])
def crashes(context: dg.AssetExecutionContext, gpu: AcceleratorResource) -> None:
    gpu.run(context, Telling(raises=True))


@dg.asset(key=["leaky", "raises"])
@step
def raises(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
    raise ValueError(every())


@dg.asset(key=["leaky", "tells"])
@step
def tells(
    context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
) -> dg.MaterializeResult:
    gpu.run(context, Telling(raises=False))
    metadata = {"plain": every(), "text": dg.MetadataValue.text(every()), "md": dg.MetadataValue.md(every()),
                "json": {"list": [every()]}}
    return dg.MaterializeResult(metadata=metadata)
"""
HUB_DATASET = """type: mllm_assets.components.ImageTextDataset
attributes:
  name: birds
  source: {kind: huggingface, repo: made/set, revision: main}
  prompts: ["What is this?"]
"""


def planted() -> dict[str, str]:
    def random(num_chars: int) -> str:
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(num_chars))

    return {
        "HF_TOKEN": f"hf_{random(34)}",
        "AWS_SECRET_ACCESS_KEY": random(40),
        "WANDB_API_KEY": random(40),
        "MLLM_ASSETS_API_KEY": random(48),
        "MLLM_ASSETS_ALERT_WEBHOOK": f"https://hooks.test/services/{random(24)}",
    }


def failing(project: Project, selection: str) -> str:
    process = project.materialize(selection)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 1, output
    return output


def command(project: Project, *arguments: str) -> tuple[int, str]:
    process = project.start("mllm_assets.cli", *arguments)
    output, _ = process.communicate(timeout=500)
    return process.returncode, output


def test_no_planted_secret_is_written_or_printed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, in_recipe = planted(), planted()["HF_TOKEN"]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    defs = project.root / project.package / "defs"
    (defs / "leaky.py").write_text(LEAKY)
    (defs / "datasets" / "birds").mkdir()
    (defs / "datasets" / "birds" / "defs.yaml").write_text(HUB_DATASET)
    project.write_recipe("mine", max_steps=2, max_samples=16)
    project.write_recipe("told", hub_token=in_recipe)
    project.write_recipe("disguised", run_name=f"run {in_recipe}")
    project.set_defaults(gates=EVERYTHING_PASSES)

    outputs = [project.made(f'{line_of("mine")} or key:"leaky/tells"')]
    assert len(list_releases(project.layout, "mine")) == 1
    with running_hub() as hub:
        hub.repos = {"datasets/made/set": Repo.of({}, gated=True)}
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HOME", str(project.root / "hf"))
        names = ("birds/raw", "told/checkpoint", "disguised/checkpoint", "leaky/crashes", "leaky/raises")
        outputs.append(failing(project, " or ".join(f'key:"{name}"' for name in names)))
    assert "The Hub does not accept HF_TOKEN" in outputs[-1]
    assert "hub_token is not supported with this value: secrets do not belong in a recipe" in outputs[-1], outputs[-1]
    assert "the value of run_name holds what looks like a token or password" in outputs[-1]
    assert "RuntimeError: raised HF_TOKEN AWS_SECRET_ACCESS_KEY" in outputs[-1]
    for arguments, code in ((("max_steps=1",), 0), ((f"hub_token={in_recipe}",), 2), ((f"run_name={in_recipe}",), 2)):
        returned, output = command(project, "train", "configs/mine.yaml", "max_samples=16", *arguments)
        assert returned == code, output
        outputs.append(output)

    everything = [*environment.values(), in_recipe, environment["MLLM_ASSETS_ALERT_WEBHOOK"].rpartition("/")[2]]
    for output in outputs:
        assert not [value for value in everything if value in output]
    for name in ("plain", "text", "md", "json"):
        assert "HF_TOKEN AWS_SECRET_ACCESS_KEY" in json.dumps(project.metadata("leaky", "tells")[name])
    files = [path for path in project.root.rglob("*") if path.is_file() and path.parent.name != "configs"]
    assert len(files) > 100 and any(path.suffix == ".db" for path in files)
    leaks = {path: value for path in files for value in everything if value.encode() in path.read_bytes()}
    assert leaks == {}
    rows = QualityStore(project.layout.quality_db).query("SELECT metadata FROM runs")  # DuckDB compresses texts
    assert rows and not [value for value in everything if value in str(rows)]
    assert yaml.safe_load(Path(project.root, "configs", "told.yaml").read_text())["hub_token"] == in_recipe
