"""Pretrained models as assets: `pretrained/<model>`, one per model of the `defs.yaml`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import dagster as dg
from pydantic import Field

from mllm_assets.artifacts import slug
from mllm_assets.components.component_secrets import refused_for_secret
from mllm_assets.components.progress import OBSERVE_EVERY_S
from mllm_assets.components.resources import AcceleratorResource, ProjectResource, failures_for_people
from mllm_assets.training.pretrained import PretrainedResult, describe_model, fetch_snapshot


class Model(dg.Model, dg.Resolvable):
    """One model directory below `pretrains/`."""

    name: str = Field(description="Folder below pretrains/, for example gemma3-4b-it.")
    kind: Literal["huggingface", "local", "tiny_gemma3"] = Field(
        description="A Hub snapshot, a directory that you put there yourself, or the tiny Gemma 3 built in code."
    )
    repo: str = Field(default="", description="Hub id, for example google/gemma-3-4b-it.")
    revision: str | None = Field(default=None, description="Branch, tag or commit; resolved to a commit and recorded.")
    license: str = Field(default="", description="Its licence, for the model card; for example gemma.")

    @property
    def key(self) -> dg.AssetKey:
        return dg.AssetKey(["pretrained", slug(self.name)])

    @property
    def directory(self) -> str:
        """Where a recipe's `model_name_or_path` finds it."""
        return f"pretrains/{self.name}"


class PretrainedModels(dg.Component, dg.Model, dg.Resolvable):
    """Models to start from. Each becomes `pretrained/<name>` with a fingerprint of its content as data version."""

    models: list[Model]

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        if refused := refused_for_secret(self, context, dg.AssetKey(["pretrained"]), "ingest"):
            return refused
        return dg.Definitions(assets=[_pretrained_asset(model) for model in self.models])


def _pretrained_asset(model: Model) -> dg.AssetsDefinition:
    source = {"huggingface": f"{model.repo} of the Hub", "local": "a local directory", "tiny_gemma3": "built in code"}

    @dg.asset(
        key=model.key,
        group_name="ingest",
        kinds={"pytorch"},
        code_version=f"{model.kind}:{model.repo}:{model.revision}",
        description=f"{model.directory}: {source[model.kind]}.",
    )
    def pretrained(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        with failures_for_people():
            result = _obtain(model, project.layout.root / model.directory, context, gpu)
        return project.recorded(
            context,
            dg.MaterializeResult(
                data_version=dg.DataVersion(result.fingerprint),
                metadata={
                    "size_mib": round(result.num_bytes / 2**20, 1),
                    "revision": result.revision or "",
                    "hub_id": model.repo,
                    "license": model.license,
                    "model_path": project.layout.relative(result.directory),
                },
            ),
        )

    return pretrained


def _obtain(
    model: Model, directory: Path, context: dg.AssetExecutionContext, gpu: AcceleratorResource
) -> PretrainedResult:
    if model.kind == "huggingface":
        return fetch_snapshot(model.repo, model.revision, directory, say=_seldom(context.log.info))
    if model.kind == "tiny_gemma3":
        gpu.run(context, {"task": "build_pretrained", "directory": str(directory)})
    return describe_model(directory)


def _seldom(say: Callable[[str], None]) -> Callable[[str], None]:
    """Pass on what is said at most every few seconds: each line is a row of Dagster's event log."""
    last_s = time.monotonic()

    def said(text: str) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= OBSERVE_EVERY_S:
            last_s = time.monotonic()
            say(text)

    return said
