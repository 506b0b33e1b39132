"""A recipe's releases on disk: `releases/<recipe>/v1`, `v2`, ..., and `current`, which says which of them is in use.

A release never changes. `current` is a link beside the versions, swapped in one step; where there is none, as in a
folder of an earlier version, the newest release is the current one.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from mllm_assets.artifacts import (
    MANIFEST,
    digest_json,
    find_damage,
    is_complete,
    point_symlink,
    read_manifest,
    write_json_atomic,
    write_manifest,
)
from mllm_assets.errors import IntegrityError, ModelError
from mllm_assets.layout import Layout
from mllm_assets.project.read import materialize_command

CURRENT = "current"


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """A released model; `digest` is over the checkpoint's files and is the asset's data version."""

    directory: Path
    version: str
    digest: str


def version_number(version: str) -> int:
    """The number of a version name, 0 for what is none."""
    match = re.fullmatch(r"v([1-9]\d*)", version)
    return int(match[1]) if match else 0


def list_releases(layout: Layout, recipe_name: str) -> list[Release]:
    """Complete releases of a recipe, oldest first."""
    parent = layout.releases(recipe_name)
    paths = parent.iterdir() if parent.is_dir() else ()
    found = [path for path in paths if version_number(path.name) and is_complete(path)]
    return [_release(path) for path in sorted(found, key=lambda path: version_number(path.name))]


def released_recipes(layout: Layout) -> list[str]:
    """Recipes that have a release."""
    parent = layout.releases("any").parent
    names = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    return [name for name in names if list_releases(layout, name)]


def current_release(layout: Layout, recipe_name: str) -> Release | None:
    """The release in use, with which the next model is compared; None where nothing is released.

    Raises:
        IntegrityError: `current` points to what is no complete release.
    """
    link = layout.releases(recipe_name) / CURRENT
    if not link.is_symlink():
        releases = list_releases(layout, recipe_name)
        return releases[-1] if releases else None
    directory = link.parent / link.readlink().name
    if not is_complete(directory):
        raise IntegrityError(
            f"{link} points to {directory.name}, which is no complete release. Point it to one that is: mllm-assets "
            f"releases rollback {recipe_name} VERSION"
        )
    return _release(directory)


def find_release(layout: Layout, recipe_name: str, version: str | None = None) -> Release:
    """The release of a version, by default the current one.

    Raises:
        ModelError: There is none. Names those that there are.
    """
    releases = {release.version: release for release in list_releases(layout, recipe_name)}
    if not releases:
        known = ", ".join(released_recipes(layout)) or "none"
        raise ModelError(
            f"{recipe_name} has no release below {layout.root}; recipes that have one: {known}. Make it: "
            f"{materialize_command(f'{recipe_name}/released_model')}"
        )
    if version in (None, CURRENT):
        current = current_release(layout, recipe_name)
        assert current is not None
        return current
    if version not in releases:
        raise ModelError(f"{recipe_name} has no release {version!r}. Name one of {', '.join(releases)}.")
    return releases[version]


def make_current(layout: Layout, release: Release) -> None:
    """Let `current` point to a release; a reader sees the old or the new one."""
    point_symlink(release.directory.parent / CURRENT, release.directory)


def roll_back(layout: Layout, recipe_name: str, version: str | None = None) -> tuple[Release, Release]:
    """Make another release the current one; nothing is deleted, and the same command leads forward again.

    Args:
        layout: Where releases lie.
        recipe_name: The recipe's slug.
        version: By default the one before the current one.

    Returns:
        The release that was current, and the one that is.

    Raises:
        ModelError: There is no such release, or none before the current one.
        IntegrityError: It is damaged. Names the file.
    """
    find_release(layout, recipe_name, version)  # before the lock makes a folder for a name that is none
    with releases_lock(layout, recipe_name):
        releases = list_releases(layout, recipe_name)
        if version is not None:
            target = find_release(layout, recipe_name, version)
            before = _current_or(target, layout, recipe_name)
        else:
            before = find_release(layout, recipe_name)
            older = [r for r in releases if version_number(r.version) < version_number(before.version)]
            if not older:
                raise ModelError(
                    f"{before.version} is the oldest release of {recipe_name}, so there is none to go back to. Name "
                    f"another one: mllm-assets releases rollback {recipe_name} VERSION"
                )
            target = older[-1]
        require_intact(target.directory)
        make_current(layout, target)
    return before, target


def _current_or(target: Release, layout: Layout, recipe_name: str) -> Release:
    """The current release, or `target` where `current` is broken, which a rollback mends."""
    try:
        return current_release(layout, recipe_name) or target
    except IntegrityError:
        return target


def is_release(directory: Path) -> bool:
    """Whether a directory is one of a recipe's releases, or a copy of one."""
    return is_complete(directory) and {"version", "manifest_digest"} <= read_manifest(directory).keys()


def find_release_damage(directory: Path, *, deep: bool = True) -> str | None:
    """Say what is not as it was released, the manifest included, or None. `deep` compares digests, else sizes only."""
    manifest = read_manifest(directory)
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
        recipe_name = read_manifest(directory).get("recipe", "RECIPE")
        raise IntegrityError(
            f"{directory} is not what was released: {damage}. Use another release (mllm-assets releases list "
            f"{recipe_name}; mllm-assets releases rollback {recipe_name} VERSION), or materialise "
            f"{recipe_name}/released_model again, which makes a new version of the same checkpoint."
        )


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


@contextmanager
def releases_lock(layout: Layout, recipe_name: str) -> Iterator[None]:
    """Hold off others that release or roll back the same recipe."""
    folder = layout.releases(recipe_name)  # not the lock's: what is refused leaves no folder that looks like a release
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


def _release(directory: Path) -> Release:
    return Release(directory=directory, version=directory.name, digest=read_manifest(directory)["digest"])
