"""Pretrained models as assets: `pretrained/<model>` for each model of the `defs.yaml`."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import dagster as dg

from mllm_assets.artifacts import UNNAMED, slug
from mllm_assets.components.assets.step import step
from mllm_assets.components.progress import OBSERVE_EVERY_S
from mllm_assets.components.reporting import failing_asset
from mllm_assets.components.resources import AcceleratorResource, ProjectResource
from mllm_assets.components.switches import off_asset, off_text, switched_on
from mllm_assets.components.yaml_checks import refuse_secrets
from mllm_assets.components.yaml_model import YamlModel
from mllm_assets.errors import RecipeError
from mllm_assets.training.runs.models import PretrainedResult, describe_model, fetch_snapshot
from mllm_assets.worker.tasks import BuildTask

MAX_NAME_CHARS = 200


class Model(YamlModel):
    """One model directory below `pretrains/`.

    Attributes:
        name: Folder below pretrains/, for example gemma3-4b-it.
        kind: A Hub snapshot, a directory that you provide, or the tiny Gemma 3 built in code.
        repo: Hub id, for example google/gemma-3-4b-it.
        revision: Branch, tag or commit; resolved to a commit and recorded.
        license: Its licence, for the model card; for example gemma.
        enabled: Whether it may be fetched; false until a recipe that needs it is switched on.
    """

    name: str
    kind: Literal["huggingface", "local", "tiny_gemma3"]
    repo: str = ""
    revision: str | None = None
    license: str = ""
    enabled: bool = True

    @property
    def key(self) -> dg.AssetKey:
        return dg.AssetKey(["pretrained", slug(self.name, UNNAMED)])

    @property
    def directory(self) -> str:
        """Where a recipe's `model_name_or_path` finds it."""
        return f"pretrains/{self.name}"


class PretrainedModels(dg.Component, YamlModel):
    """Models to start from. Each becomes `pretrained/<name>` with a fingerprint of its content as data version.

    Attributes:
        models: Directories below `pretrains/`.
    """

    models: list[Model]

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        if refused := refuse_secrets(self, context, dg.AssetKey(["pretrained"])):
            return refused
        on = switched_on(context)
        return dg.Definitions(assets=[_asset(model, is_on=model.directory in on) for model in self.models])


def _asset(model: Model, *, is_on: bool) -> dg.AssetsDefinition:
    if wrong := wrong_name(model.name):
        error = RecipeError(
            f"models.name is {model.name[:40]!r}, which {wrong}. Give the name of a folder right below pretrains/, for "
            "example gemma3-4b-it."
        )
        return failing_asset(model.key, error)
    return _pretrained_asset(model) if model.enabled or is_on else _off(model)


def wrong_name(name: str) -> str | None:
    """Why a model's folder cannot have a name; what is written into it must stay below `pretrains/`."""
    if "/" in name or name.startswith((".", "~")):
        return "leads elsewhere"
    if not name.isprintable() or not re.search("[a-z0-9]", name.lower()):
        return "has no letter or digit, or a character that is not printable"
    return f"is longer than {MAX_NAME_CHARS} characters" if len(name) > MAX_NAME_CHARS else None


def _off(model: Model) -> dg.AssetsDefinition:
    source = f"needs {model.repo} of the Hub" if model.repo else "is not enabled"
    return off_asset(_pretrained_asset(model), off_text(slug(model.name, UNNAMED), source))


def _pretrained_asset(model: Model) -> dg.AssetsDefinition:
    source = {"huggingface": f"{model.repo} of the Hub", "local": "a local directory", "tiny_gemma3": "built in code"}

    @dg.asset(
        key=model.key,
        group_name="pretrained",
        tags={"stage": "ingest"},
        kinds={"pytorch"},
        code_version=f"{model.kind}:{model.repo}:{model.revision}",
        description=f"{model.directory}: {source[model.kind]}.",
    )
    @step
    def pretrained(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        result = _obtain(model, project.layout.root / model.directory, context, gpu)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(result.fingerprint),
            metadata={
                "size_mib": round(result.num_bytes / 2**20, 1),
                "revision": result.revision or "",
                "hub_id": model.repo,
                "license": model.license,
                "model_path": project.layout.relative(result.directory),
            },
        )

    return pretrained


def _obtain(
    model: Model, directory: Path, context: dg.AssetExecutionContext, gpu: AcceleratorResource
) -> PretrainedResult:
    if model.kind == "huggingface":
        return fetch_snapshot(model.repo, model.revision, directory, notify=_throttled(context.log.info))
    if model.kind == "tiny_gemma3":
        gpu.run(context, BuildTask(directory=directory))
    return describe_model(directory)


def _throttled(notify: Callable[[str], None]) -> Callable[[str], None]:
    """Pass on at most one message every few seconds: each is a row of Dagster's event log."""
    last_s = time.monotonic()

    def notify_throttled(text: str) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= OBSERVE_EVERY_S:
            last_s = time.monotonic()
            notify(text)

    return notify_throttled
