"""The directory of the model that a run starts from: where it is, what names its content, whether it is as written."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from mllm_assets.artifacts import (
    MANIFEST,
    digest_json,
    find_damage,
    fsync_path,
    is_complete,
    is_sound,
    lock_path,
    move_aside,
    read_manifest,
    resolved_path,
    slug,
    write_manifest,
)
from mllm_assets.errors import IntegrityError, MllmAssetsError, ModelError
from mllm_assets.file_digests import FileDigests
from mllm_assets.hub.errors import HubRepo
from mllm_assets.hub.snapshot import download, find_snapshot, require_safe_shards
from mllm_assets.project.read import declared_models, materialize_command
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.recipe.load import Recipe, load_recipe

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PUBLISHED = ("model", "adapter")  # what a finished run holds for others to use; the second only with LoRA
HOW_TO_NAME = (
    "a model or run directory, checkpoint-<step> of a run, a release (emoji_sft@v1), a recipe (emoji_sft: its newest "
    "release, else its latest run) or pretrained/<model>"
)


def find_model_dir(recipe: Recipe, root: Path) -> Path:
    """The directory that `model_name_or_path` names, relative to the root, links followed.

    Raises:
        ModelError: It is missing, or is a run instead of its model. Says how to get it.
    """
    name = recipe.spec.model_name_or_path
    directory = resolved_path(root, name, what=f"{recipe.path}: model_name_or_path")
    if not directory.is_dir():
        raise ModelError(
            f"{recipe.path}: model_name_or_path is {name}, and {directory} is not a directory. "
            f"{_how_to_get(directory, recipe, root)}"
        )
    if not (directory / "config.json").exists() and (directory / "model" / "config.json").is_file():
        raise ModelError(
            f"{recipe.path}: model_name_or_path is {name}, which is a run; its model is in the folder model/ of it. "
            f"Write model_name_or_path: {name.rstrip('/')}/model"
        )
    return directory


def find_adapters(recipe: Recipe, root: Path) -> tuple[Path, ...]:
    """The directories that `adapter_name_or_path` names, relative to the root, links followed.

    Raises:
        ModelError: One is missing, or holds no adapter as safetensors. Says what to name.
    """
    found = []
    for name in recipe.spec.adapters:
        directory = resolved_path(root, name, what=f"{recipe.path}: adapter_name_or_path")
        if not (directory / "adapter_config.json").is_file() and (directory / "adapter").is_dir():
            raise ModelError(
                f"{recipe.path}: adapter_name_or_path names {name}, which is a run; its adapter is in the folder "
                f"adapter/ of it. Write adapter_name_or_path: {name.rstrip('/')}/adapter"
            )
        if missing := [file for file in ("adapter_config.json", ADAPTER_WEIGHTS) if not (directory / file).is_file()]:
            raise ModelError(
                f"{recipe.path}: adapter_name_or_path names {name}, and {directory} has no {missing[0]}. Name the "
                "folder of a LoRA adapter, for example outputs/my_lora/latest/adapter."
            )
        found.append(directory)
    return tuple(found)


def starting_fingerprint(
    model_dir: Path, adapters: Sequence[Path], digests: FileDigests | None = None, *, read: FileDigests | None = None
) -> str:
    """Name what a run starts from: the model's `model_fingerprint`, and the adapters on it where there are some."""
    model = model_fingerprint(model_dir, digests, read=read)
    if not adapters:
        return model
    digest = (digests or FileDigests()).of
    files = [[digest(path / name) for name in ("adapter_config.json", ADAPTER_WEIGHTS)] for path in adapters]
    return digest_json([model, files])[:16]


def _how_to_get(directory: Path, recipe: Recipe, root: Path) -> str:
    for path in sorted(recipe.path.parent.glob("*.yaml")):
        try:
            output_dir = (root / load_recipe(path).spec.output_dir).resolve()
        except MllmAssetsError:
            continue  # its error is shown when it is trained
        if directory.is_relative_to(output_dir) and path != recipe.path:
            return f"Train the recipe that makes it first: mllm-assets train {path}"
    if directory.is_relative_to(root.resolve() / "outputs"):
        return "Train the recipe whose output_dir it is in first: mllm-assets train RECIPE"
    if directory.parent == (root / "pretrains").resolve() and directory.name in declared_models(Path.cwd()):
        return f"Make it with: {materialize_command(f'pretrained/{slug(directory.name)}')}"
    return f"Download the model there, for example: hf download google/gemma-3-4b-it --local-dir {directory}"


def model_fingerprint(directory: Path, digests: FileDigests | None = None, *, read: FileDigests | None = None) -> str:
    """Name a model directory's content: 16 hex digits over the names and digests of its files.

    The digests come from a manifest if there is one (its own, or that of the run which the directory is part of),
    otherwise from the files. With `digests`, which remembers them, the files are read in any case and compared with the
    manifest, at about 1.6 GB a CPU-second; `read` remembers what was read without a manifest.
    README, LICENSE and hidden files do not count: the same weights have the same name.

    Raises:
        ModelError: The directory or its config.json does not exist.
        IntegrityError: A file no longer has the size, or with `digests` the digest, that the manifest says.
    """
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"{directory} holds no model: it has no config.json. Materialise the model's asset, or put a Hugging Face "
            "model directory there."
        )
    known = _manifest_digests(directory, digests)
    require_safe_shards(directory, "Download or make the model again.")
    if known is None:
        paths = (path for path in directory.rglob("*") if path.is_file())
        names = {path.relative_to(directory).as_posix(): path for path in paths}
        digest = (digests or read or FileDigests()).of
        known = {name: digest(path) for name, path in names.items() if _counts(name)}
    return digest_json(known)[:16]


def find_run_damage(run_dir: Path) -> str | None:
    """Say what of a finished run's model or manifest is not as it was written, every byte compared, or None."""
    try:
        return find_damage(run_dir, only=PUBLISHED)
    except IntegrityError:
        return f"{MANIFEST} cannot be read"


def reopen_run(run_dir: Path) -> None:
    """Let a finished run count as unfinished: trained again it resumes, and writes its model again.

    Until then nobody starts from the model, which is moved aside beside the run.
    """
    for name in (MANIFEST, *PUBLISHED):
        if (run_dir / name).exists():
            move_aside(run_dir / name, run_dir.parent)


def _manifest_digests(directory: Path, digests: FileDigests | None) -> dict[str, str] | None:
    for owner, prefix in ((directory, ""), (directory.parent, f"{directory.name}/")):
        if not is_complete(owner):
            continue
        files = read_manifest(owner)["files"]
        names = [name for name in files if name.startswith(prefix) and _counts(name.removeprefix(prefix))]
        if f"{prefix}config.json" not in names:
            continue
        cure = _train_again(owner) if prefix else "Materialise its asset again."
        for name in names:
            path, expected = owner / name, files[name]["num_bytes"]
            found = path.stat().st_size if path.is_file() else 0
            if found != expected:
                raise IntegrityError(f"{path} has {found} bytes, but {MANIFEST} says {expected}. {cure}")
            if digests and digests.of(path) != files[name]["sha256"]:
                raise IntegrityError(
                    f"{path} does not match its digest in {MANIFEST}: its bytes changed since it was written. {cure}"
                )
        return {name.removeprefix(prefix): files[name]["sha256"] for name in names}
    return None


def _train_again(run_dir: Path) -> str:
    name = read_manifest(run_dir).get("recipe_name")
    which = f"its recipe, {name}," if name else "its recipe"
    return f"Train {which} again: it resumes from its last checkpoint and writes the model again."


def _counts(name: str) -> bool:
    parts = name.split("/")
    hidden = any(part.startswith(".") for part in parts)
    return not hidden and parts[-1] != MANIFEST and not parts[-1].startswith(("README", "LICENSE"))


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model that can be asked."""

    name: str  # as the user wrote it
    directory: Path  # a Hugging Face model directory, or a `checkpoint-<step>` of a run
    turns: TurnSettings = TurnSettings()  # as in its training, if that is recorded
    media_dir: str | None = None  # likewise: what its images' paths are relative to


def find_model(directory: Path) -> Path:
    """Return the model directory or checkpoint that a path names: itself, or `model/` of a training run.

    Raises:
        ModelError: It names neither. Says what the path is and what to give instead.
    """
    if (directory / "config.json").is_file() or is_checkpoint(directory):
        return directory
    if (directory / "model" / "config.json").is_file():
        return directory / "model"
    if not directory.exists():
        raise ModelError(
            f"{directory} does not exist. Give a model directory, for example outputs/<recipe>/latest/model."
        )
    if not directory.is_dir():
        raise ModelError(f"{directory} is a file, not a model directory. Give {HOW_TO_NAME}.")
    raise ModelError(
        f"{directory} is not a model directory: it has neither config.json nor model/config.json. "
        "Give a Hugging Face model directory, a release or a finished training run."
    )


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory holds what a run has trained up to a step, and not a complete model."""
    is_named_so = re.fullmatch(r"checkpoint-\d+", directory.name) is not None
    return is_named_so and directory.is_dir() and not (directory / "config.json").is_file()


def checkpoint_digest(checkpoint: Path) -> str:
    """What names the files of a `checkpoint-<step>`."""
    return digest_json(read_manifest(checkpoint)["files"])


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
        ModelError: It does not hold a model.
    """
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"{directory} holds no config.json, so it is not a Hugging Face model directory. "
            f"Put the model there, for example: hf download google/gemma-3-4b-it --local-dir {directory}"
        )
    num_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return PretrainedResult(
        directory=directory, fingerprint=model_fingerprint(directory), revision=revision, num_bytes=num_bytes
    )


def model_repo(repo: str, revision: str | None, directory: Path, *, endpoint: str | None = None) -> HubRepo:
    """A model's repository on the Hub, and what to do when it cannot be fetched."""
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
    notify: Callable[[str], None] = lambda text: None,
) -> PretrainedResult:
    """Download a model at the commit of its revision (branch, tag or commit); a broken download continues.

    `directory` appears only when it is complete. One that the user supplied is left unchanged, and so is one that was
    fetched for the same repository and revision: a branch is followed when the revision in the YAML changes or the
    directory is deleted.

    Raises:
        SourceError: The Hub cannot be reached, or does not give the model. Says what to do.
        ModelError: The repository holds no model whose files cannot carry code.
        MachineError: The disk has not enough space; nothing was fetched.
    """
    hub = model_repo(repo, revision, directory, endpoint=endpoint)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock_path(directory)):
        if (kept := _kept(directory, repo, revision)) is not None:
            return kept
        commit, files = find_snapshot(hub)
        partial = directory.with_name(f".{directory.name}.download")
        download(hub, commit, files, partial, notify)
        write_manifest(partial, {"repo": repo, "revision": commit, "requested_revision": revision})
        _swap(partial, directory)
    return describe_model(directory, commit)


def _kept(directory: Path, repo: str, revision: str | None) -> PretrainedResult | None:
    if not directory.is_dir():
        return None
    if not is_complete(directory):
        return describe_model(directory)
    manifest = read_manifest(directory)
    if "requested_revision" not in manifest:  # not fetched by us, so the user's
        return describe_model(directory, manifest.get("revision"))  # refuses one that was changed since
    same = manifest["repo"] == repo and revision in (manifest["revision"], manifest["requested_revision"])
    return describe_model(directory, manifest["revision"]) if same and is_sound(directory) else None


def _swap(new: Path, directory: Path) -> None:
    """Replace what was fetched here; files that someone changed are kept aside until `gc`, not deleted."""
    is_as_fetched = is_sound(directory)
    old = move_aside(directory) if directory.exists() else None
    new.rename(directory)
    fsync_path(directory.parent)
    if old is not None and is_as_fetched:
        shutil.rmtree(old, ignore_errors=True)
