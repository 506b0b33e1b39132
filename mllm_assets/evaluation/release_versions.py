"""A recipe's releases on disk: `releases/<recipe>/v1`, `v2`, ..., and `current`, which says which of them is in use.

A release never changes. `current` is a link beside the versions, swapped in one step; where there is none, as in a
folder of an earlier version, the newest release is the current one.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from mllm_assets.artifacts import point_symlink, read_manifest
from mllm_assets.errors import IntegrityError, ModelError
from mllm_assets.evaluation.release_integrity import require_intact
from mllm_assets.layout import Layout
from mllm_assets.project.read import materialize_command, require_known_recipe

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


def version_folders(layout: Layout, recipe_name: str) -> list[Path]:
    """The folder of every version of a recipe, oldest first, damaged ones included."""
    parent = layout.releases(recipe_name)
    paths = parent.iterdir() if parent.is_dir() else ()
    return sorted((path for path in paths if version_number(path.name)), key=lambda path: version_number(path.name))


def list_releases(layout: Layout, recipe_name: str) -> list[Release]:
    """Releases of a recipe whose manifest can be read, oldest first."""
    return [release for path in version_folders(layout, recipe_name) if (release := _readable(path))]


def released_recipes(layout: Layout) -> list[str]:
    """Recipes that have a release, be it a damaged one."""
    parent = layout.releases("any").parent
    names = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    return [name for name in names if version_folders(layout, name)]


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
    release = _readable(directory)
    if release is None:
        sound = list_releases(layout, recipe_name)
        raise IntegrityError(
            f"{link} points to {directory.name}, which is no complete release. "
            + (
                f"Point it to one that is: mllm-assets releases rollback {recipe_name} {sound[-1].version}"
                if sound
                else f"There is none to point it to. Make one: {materialize_command(f'{recipe_name}/released_model')}"
            )
        )
    return release


def find_release(layout: Layout, recipe_name: str, version: str | None = None) -> Release:
    """The release of a version, by default the current one.

    Raises:
        ModelError: There is none. Names those that there are.
        IntegrityError: It has no manifest that can be read.
    """
    releases = {release.version: release for release in list_releases(layout, recipe_name)}
    damaged = [path for path in version_folders(layout, recipe_name) if path.name not in releases]
    for path in damaged if not releases else [path for path in damaged if path.name == version]:
        require_intact(path)
    if not releases:
        require_known_recipe(layout, recipe_name)
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
                newer = f"mllm-assets releases rollback {recipe_name} {releases[-1].version}"
                raise ModelError(
                    f"{before.version} is the oldest release of {recipe_name}, so there is none to go back to. "
                    + (f"To the newest one: {newer}" if len(releases) > 1 else "It is the only one.")
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


@contextmanager
def releases_lock(layout: Layout, recipe_name: str) -> Iterator[None]:
    """Hold off others that release or roll back the same recipe."""
    folder = layout.releases(recipe_name)  # not the lock's: what is refused leaves no folder that looks like a release
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


def _readable(directory: Path) -> Release | None:
    try:
        digest = read_manifest(directory)["digest"]
    except (IntegrityError, KeyError):  # no manifest, or none of a release
        return None
    return Release(directory=directory, version=directory.name, digest=digest)
