"""Pretrained models on disk: a Hub snapshot at a pinned commit, or a directory that the user brought."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mllm_assets.artifacts import is_complete, read_manifest, write_manifest
from mllm_assets.errors import ModelError
from mllm_assets.hub import REACH_TIMEOUT_S, REQUEST_TIMEOUT_S, HubRepo, explained, within
from mllm_assets.training.runs import model_fingerprint

MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "README.md", "LICENSE*"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainedResult:
    """A model directory and what names its content."""

    directory: Path
    fingerprint: str
    revision: str | None
    num_bytes: int


def describe_model(directory: Path, revision: str | None = None) -> PretrainedResult:
    """Fingerprint a model directory.

    Raises:
        ModelError: There is no model in it.
    """
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"{directory} holds no config.json, so it is no Hugging Face model directory. "
            f"Put the model there, for example: hf download google/gemma-3-4b-it --local-dir {directory}"
        )
    num_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return PretrainedResult(
        directory=directory, fingerprint=model_fingerprint(directory), revision=revision, num_bytes=num_bytes
    )


def fetch_snapshot(repo: str, revision: str | None, directory: Path) -> PretrainedResult:
    """Download a model at a pinned commit; a directory that is already there is kept as it is.

    A broken download goes on where it stopped. Only safetensors weights and text files are taken, never pickles.

    Raises:
        SourceError: The Hub cannot be reached, or does not give the model. Says what to do.
    """
    if directory.is_dir():
        stored = read_manifest(directory).get("revision") if is_complete(directory) else None
        return describe_model(directory, stored)
    from huggingface_hub import HfApi, snapshot_download

    hub = HubRepo(
        kind="model",
        repo=repo,
        revision=revision,
        setting="repo in defs/pretrained/defs.yaml",
        otherwise=f"Or put the model into {directory} yourself; pretrains/gemma3_tiny needs no network.",
    )
    token = os.environ.get("HF_TOKEN") or False
    partial = directory.with_name(f".{directory.name}.download")

    def find_commit() -> str | None:
        return HfApi(token=token).model_info(repo, revision=revision, timeout=REQUEST_TIMEOUT_S).sha

    commit = explained(hub, lambda: within(REACH_TIMEOUT_S, find_commit))
    explained(
        hub,
        lambda: snapshot_download(repo, revision=commit, local_dir=partial, allow_patterns=MODEL_FILES, token=token),
    )
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    write_manifest(partial, {"repo": repo, "revision": commit})
    partial.rename(directory)
    return describe_model(directory, commit)
