"""Whether a release on disk is what was released: its manifest has a digest of its own, and one of every file."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import (
    MANIFEST,
    digest_json,
    find_damage,
    is_complete,
    read_manifest,
    write_json_atomic,
    write_manifest,
)
from mllm_assets.errors import IntegrityError
from mllm_assets.project.read import materialize_command

_JUDGED_BY = "eval_metrics.json"  # every release holds it beside the model, and nothing else does


def is_release(directory: Path) -> bool:
    """Whether a directory is one of a recipe's releases, or a copy of one, whatever became of it."""
    path = directory.resolve()
    if path.parent.parent.name == "releases" and re.fullmatch(r"v[1-9]\d*", path.name):
        return True
    if (path / _JUDGED_BY).is_file() and (path / "config.json").is_file():
        return True
    return is_complete(path) and {"version", "manifest_digest"} <= read_manifest(path).keys()


def find_release_damage(directory: Path, *, deep: bool = True) -> str | None:
    """Say what is not as it was released, the manifest included, or None. `deep` compares digests, else sizes only."""
    if not is_complete(directory):
        return f"{MANIFEST} is missing"
    try:
        manifest = read_manifest(directory)
    except IntegrityError:
        return f"{MANIFEST} cannot be read"
    if manifest.pop("manifest_digest", None) != digest_json(manifest):
        return f"{MANIFEST} was changed"
    # a file more, such as an adapter or a chat template, changes what is loaded
    known = {MANIFEST, *manifest["files"]}
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}
    if added := sorted(name for name in found - known if not Path(name).name.startswith(".")):
        return f"{added[0]} was added"
    return find_damage(directory, deep=deep)


def require_intact(directory: Path) -> None:
    """Compare every file of a release with the digest it was released with.

    Raises:
        IntegrityError: Names the file that is missing or changed, and what to use in its place.
    """
    if damage := find_release_damage(directory):
        recipe_name = _recipe_of(directory)
        other = _newest_sound_beside(directory)
        another = (
            f"Use another release (mllm-assets releases rollback {recipe_name} {other}), or"
            if other
            else "No sound release lies beside it;"
        )
        raise IntegrityError(
            f"{directory} is not what was released: {damage}. {another} make a new version of the same "
            f"checkpoint: {materialize_command(f'{recipe_name}/released_model')}"
        )


def _newest_sound_beside(directory: Path) -> str | None:
    """The newest other version of a release whose files have their sizes."""
    path = directory.resolve()
    if path.parent.parent.name != "releases":  # a copy
        return None
    others = [other for other in path.parent.glob("v*") if re.fullmatch(r"v[1-9]\d*", other.name) and other != path]
    sound = [other.name for other in others if find_release_damage(other, deep=False) is None]
    return max(sound, key=lambda version: int(version[1:]), default=None)


def _recipe_of(directory: Path) -> str:
    path = directory.resolve()
    if path.parent.parent.name == "releases":
        return path.parent.name
    try:
        return read_manifest(path)["recipe"]  # of a copy
    except (IntegrityError, KeyError):
        return "RECIPE"


def seal(directory: Path, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Write a release's manifest, with a digest of its own, and take the write permission off all files.

    Large files share their blocks, and so their permissions, with the run that they were made by. Folders stay
    writable: whoever wants a release gone deletes its folder.
    """
    manifest = write_manifest(directory, payload)
    manifest["manifest_digest"] = digest_json(manifest)
    write_json_atomic(directory / MANIFEST, manifest)
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode & ~0o222)
    return manifest
