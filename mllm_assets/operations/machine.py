"""Versions, device, disk and write access of this machine."""

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.requirements import Requirement

from mllm_assets.errors import MachineError, SourceError
from mllm_assets.hub.client import require_access
from mllm_assets.hub.errors import hub_token
from mllm_assets.layout import Layout
from mllm_assets.operations.findings import Finding
from mllm_assets.settings import device_from_environment
from mllm_assets.store.errors import SETTING
from mllm_assets.store.objects import Store
from mllm_assets.training.runs.models import model_repo

GIB = 2**30
SHOWN = ("mllm-assets", "dagster", "torch", "transformers", "accelerate", "peft", "datasets", "duckdb")
ONE_VERSION = ("dagster", "dagster-webserver", "dagster-dg-cli", "dagster-graphql", "dagster-pipes")
# A full fine-tuning of gemma-3-4b writes a model of 8.6 GB and optimizer states of twice that
MIN_FREE_GIB, ENOUGH_FREE_GIB = 1.0, 20.0
MIN_MEMORY_GIB = 2.0
PROBE_TIMEOUT_S = 120


def check_versions() -> list[Finding]:
    """Whether the installed packages are those that this one requires, and Dagster's are of one version."""
    wrong = [text for line in importlib.metadata.requires("mllm-assets") or () if (text := _unmet(Requirement(line)))]
    parts = {name: version for name in ONE_VERSION if (version := _version(name)) is not None}
    if len(set(parts.values())) > 1:
        wrong.append(f"Dagster's packages differ: {', '.join(f'{name} {version}' for name, version in parts.items())}")
    shown = [f"python {platform.python_version()}", *(f"{name} {_version(name)}" for name in SHOWN)]
    if not wrong:
        return [Finding("versions", "ok", ", ".join(shown))]
    step = "pip install -U mllm-assets, or in a checkout: make install"
    return [Finding("versions", "fail", f"{'; '.join(wrong)} ({', '.join(shown)})", step)]


def _unmet(requirement: Requirement) -> str | None:
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return None
    found = _version(requirement.name)
    if found is not None and requirement.specifier.contains(found, prereleases=True):
        return None
    return f"{requirement.name} is {found or 'missing'}, expected {requirement.specifier or 'any version'}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_device() -> Finding:
    """The device that models would run on, as PyTorch says in a separate process."""
    try:
        wanted = device_from_environment()
    except MachineError as error:
        return Finding.of_error("device", "fail", error)
    command = [sys.executable, "-m", "mllm_assets.operations.probe_device", wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        step = "Check the driver (nvidia-smi), or set MLLM_ASSETS_DEVICE=cpu."
        return Finding("device", "fail", f"PyTorch did not name a device within {PROBE_TIMEOUT_S} s.", step)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding("device", "fail", f"PyTorch does not start: {last}", "Install mllm-assets again.")
    found = json.loads(done.stdout.splitlines()[-1])
    if "error" in found:
        return Finding.of_error("device", "fail", MachineError(found["error"]))
    free_gib = found["free_gib"]
    detail = f"{found['kind']}: {found['name']}, {found['driver']}, {found['memory_gib']:.1f} GiB memory"
    detail += "" if free_gib is None else f", {free_gib:.1f} GiB of it free"
    for note in found["idle"]:
        idle = Finding.of_error("device", "warn", MachineError(note))
        return replace(idle, detail=f"{detail}. {idle.detail}")
    if free_gib is not None and free_gib < MIN_MEMORY_GIB:
        step = "End other programs; `nvidia-smi` or `top` shows them."
        return Finding("device", "warn", detail, step)
    return Finding("device", "ok", detail)


def check_disk(root: Path) -> Finding:
    """Free space where the project writes."""
    usage = shutil.disk_usage(_nearest(root))
    free_gib = usage.free / GIB
    detail = f"{free_gib:.1f} of {usage.total / GIB:.1f} GiB free at {root}"
    step = "mllm-assets gc (lists what can go), or set MLLM_ASSETS_ROOT to a folder on a larger disk."
    if free_gib < MIN_FREE_GIB:
        return Finding("disk", "fail", detail, step)
    if free_gib < ENOUGH_FREE_GIB:
        return Finding("disk", "warn", f"{detail}; gemma-3-4b needs about {ENOUGH_FREE_GIB:.0f} GiB", step)
    return Finding("disk", "ok", detail)


def check_write_access(layout: Layout, *others: Path) -> Finding:
    """Whether a file can be made in each folder that runs write to; a file is made, as root may be refused too."""
    refused = {}
    written = (layout.root, layout.data, layout.images, layout.pretrains, layout.outputs, layout.features)
    folders = (*written, layout.outputs.parent / "releases", *others)
    for folder in dict.fromkeys(map(_nearest, folders)):
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            refused[folder] = error.strerror or type(error).__name__
    if not refused:
        return Finding("write access", "ok", f"{layout.root} and the folders in it")
    [first, *_] = refused
    listed = "; ".join(f"{folder}: {reason}" for folder, reason in refused.items())
    step = f"Give this user the right to write there (chown -R $USER {first}), or set MLLM_ASSETS_ROOT."
    return Finding("write access", "fail", listed, step)


def _nearest(folder: Path) -> Path:
    """The folder, or the one that it would be made in."""
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return _nearest(folder.parent)
    except OSError:  # it may exist, but this user may not see it
        pass
    return folder


@dataclass(frozen=True, kw_only=True, slots=True)
class HubModel:
    """A declared model of the Hub; `directory` is where it goes."""

    repo: str
    revision: str | None
    directory: Path


def check_hub(models: Iterable[HubModel], *, endpoint: str | None = None) -> list[Finding]:
    """A finding for the token, which is never shown, and one for each model that is not here yet."""
    try:
        token = hub_token()
    except SourceError as error:
        return [Finding.of_error("HF_TOKEN", "fail", error)]
    missing = [model for model in models if not (model.directory / "config.json").is_file()]
    detail = "is set" if token else "is not set; only gated and private repositories need it"
    return [Finding("HF_TOKEN", "ok", detail), *(_check_model(model, endpoint) for model in missing)]


def _check_model(model: HubModel, endpoint: str | None) -> Finding:
    from huggingface_hub.constants import is_offline_mode

    check = f"Hub: {model.repo}"
    if is_offline_mode():
        return Finding(check, "ok", "not checked: HF_HUB_OFFLINE is set")
    try:
        require_access(model_repo(model.repo, model.revision, model.directory, endpoint=endpoint))
    except SourceError as error:
        return Finding.of_error(check, "warn", error)
    return Finding(check, "ok", "readable; it is fetched when a recipe needs it")


def check_store(url: str, root: Path) -> list[Finding]:
    """Read something small from the store; nothing is written to it."""
    if not url:
        return []
    try:
        Store(url, root).pointer("doctor")
    except SourceError as error:
        finding = Finding.of_error("store", "fail", error)
        return [replace(finding, next_step=finding.next_step or f"Check {SETTING}.")]
    return [Finding("store", "ok", f"{url} answers")]
