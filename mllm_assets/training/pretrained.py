"""Pretrained models on disk: a Hub snapshot at a pinned commit, or a directory that the user brought."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from mllm_assets.artifacts import fsync_path, is_complete, read_manifest, write_manifest
from mllm_assets.errors import ModelError
from mllm_assets.hub_errors import HubRepo
from mllm_assets.hub_snapshot import download, find_snapshot
from mllm_assets.training.model_directory import model_fingerprint


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


def model_repo(repo: str, revision: str | None, directory: Path, *, endpoint: str | None = None) -> HubRepo:
    """A model's repository on the Hub, and what to do when it does not come."""
    return HubRepo(
        kind="model",
        repo=repo,
        revision=revision,
        setting="repo in defs/pretrained/defs.yaml",
        otherwise=f"Or put the model into {directory} yourself; pretrains/gemma3_tiny needs no network.",
        endpoint=endpoint,
    )


def fetch_snapshot(
    repo: str,
    revision: str | None,
    directory: Path,
    *,
    endpoint: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> PretrainedResult:
    """Download a model at the commit that its revision stands for; a broken download goes on where it stopped.

    A directory that the user brought is kept as it is, and so is one that was fetched for the same repository and
    revision: a branch is followed when the revision in the YAML changes or the directory is deleted.

    Args:
        repo: Id on the Hub.
        revision: Branch, tag or commit; None is the default branch.
        directory: Where the model goes. It appears only when it is whole.
        endpoint: Another Hub than the default one.
        say: Is told how far the download is.

    Raises:
        SourceError: The Hub cannot be reached, or does not give the model. Says what to do.
        ModelError: The repository holds no model whose files cannot carry code.
        MachineError: The disk has not enough space; nothing was fetched.
    """
    hub = model_repo(repo, revision, directory, endpoint=endpoint)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(f".{directory.name}.lock")):
        if (kept := _kept(directory, repo, revision)) is not None:
            return kept
        commit, files = find_snapshot(hub)
        partial = directory.with_name(f".{directory.name}.download")
        download(hub, commit, files, partial, say)
        write_manifest(partial, {"repo": repo, "revision": commit, "requested_revision": revision})
        _swap(partial, directory)
    return describe_model(directory, commit)


def _kept(directory: Path, repo: str, revision: str | None) -> PretrainedResult | None:
    if not directory.is_dir():
        return None
    if not is_complete(directory):
        return describe_model(directory)
    manifest = read_manifest(directory)
    result = describe_model(directory, manifest.get("revision"))  # refuses one that was changed since
    if "requested_revision" not in manifest:  # not fetched by us, so the user's
        return result
    same = manifest["repo"] == repo and revision in (manifest["revision"], manifest["requested_revision"])
    return result if same else None


def _swap(new: Path, directory: Path) -> None:
    """Put a whole directory in the place of another one; killed in between, the next run does it again."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    fsync_path(directory.parent)
    shutil.rmtree(old, ignore_errors=True)
