"""A recipe's releases on disk: `releases/<recipe>/v1`, `v2`, ..., and `current`, which says which of them is in use.

A release never changes. `current` is a link next to the versions, swapped in one step; without it, as in a folder of
an earlier version, the newest release is the current one.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from mllm_assets.artifacts import (
    DIGEST,
    MANIFEST,
    find_damage,
    is_complete,
    lock_path,
    point_symlink,
    read_manifest,
    sha256_file,
    write_manifest,
)
from mllm_assets.errors import IntegrityError, ModelError
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.layout import Layout
from mllm_assets.project.read import materialize_command, require_known_recipe

CURRENT = "current"
_JUDGED_BY = "eval_metrics.json"  # every release holds it next to the model, and nothing else does


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """A released model; `digest` is over the checkpoint's files and is the asset's data version."""

    directory: Path
    version: str
    digest: str


def version_number(version: str) -> int:
    """The number of a version name, 0 if it is not one."""
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
        IntegrityError: `current` does not point to a complete release.
    """
    link = layout.releases(recipe_name) / CURRENT
    if not link.is_symlink():
        releases = list_releases(layout, recipe_name)
        return releases[-1] if releases else None
    directory = link.parent / link.readlink().name
    release = _readable(directory)
    if release is None:
        intact = list_releases(layout, recipe_name)
        raise IntegrityError(
            f"{link} points to {directory.name}, which is not a complete release. "
            + (
                f"Point it to one that is: mllm-assets releases rollback {recipe_name} {intact[-1].version}"
                if intact
                else f"There is none to point it to. Make one: {materialize_command(recipe_name)}"
            )
        )
    return release


def judged_release(layout: Layout, recipe_name: str) -> tuple[Release, pa.Table] | None:
    """The current release with its own predictions, by which it was judged; None where nothing is released.

    Where it is damaged, the newest one whose predictions are whole is what the next model is compared with: else
    nothing could be released instead.
    """
    releases = list_releases(layout, recipe_name)[::-1]
    with suppress(IntegrityError):
        releases = [release for release in [current_release(layout, recipe_name)] if release] + releases
    for release in releases:
        with suppress(IntegrityError):
            return release, read_predictions(release.directory)
    return None


def find_release(layout: Layout, recipe_name: str, version: str | None = None) -> Release:
    """The release of a version, by default the current one.

    Raises:
        ModelError: Not found. Names those that exist.
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
            f"{materialize_command(recipe_name)}"
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
    """Make another release the current one, by default the one before; return the previous and the new current one.

    Nothing is deleted, and the same command leads forward again.

    Raises:
        ModelError: There is no such release, or none before the current one.
        IntegrityError: It is damaged. Names the file.
    """
    find_release(layout, recipe_name, version)  # before the lock makes a folder for an unknown name
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
    """The current release, or `target` where `current` is broken, which a rollback fixes."""
    try:
        return current_release(layout, recipe_name) or target
    except IntegrityError:
        return target


@contextmanager
def releases_lock(layout: Layout, recipe_name: str) -> Iterator[None]:
    """Hold off others that release or roll back the same recipe."""
    path = lock_path(layout.releases(recipe_name))  # next to the folder, so that a refused release leaves none
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


def _readable(directory: Path) -> Release | None:
    try:
        digest = read_manifest(directory)["digest"]
    except (IntegrityError, KeyError):  # no manifest, or not a release's
        return None
    return Release(directory=directory, version=directory.name, digest=digest)


def is_release(directory: Path) -> bool:
    """Whether a directory is one of a recipe's releases, or a copy of one, damaged or not."""
    path = directory.resolve()
    if path.parent.parent.name == "releases" and version_number(path.name):
        return True
    if (path / _JUDGED_BY).is_file() and (path / "config.json").is_file():
        return True
    return is_complete(path) and {"version", DIGEST} <= read_manifest(path).keys()


def find_release_damage(directory: Path, *, deep: bool = True) -> str | None:
    """Name what changed since the release, the manifest included, or None. `deep` compares digests, not only sizes."""
    if not is_complete(directory):
        return f"{MANIFEST} is missing"
    try:
        manifest = read_manifest(directory)
    except IntegrityError:
        return f"{MANIFEST} cannot be read"
    if DIGEST not in manifest:
        return f"{MANIFEST} was changed"
    # an additional file, such as an adapter or a chat template, changes what is loaded
    known = {MANIFEST, *manifest["files"]}
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}
    if added := sorted(name for name in found - known if not Path(name).name.startswith(".")):
        return f"{added[0]} was added"
    return find_damage(directory, deep=deep)


def require_intact(directory: Path) -> None:
    """Compare every file of a release with the digest it was released with.

    Raises:
        IntegrityError: Names the file that is missing or changed, and what to use instead.
    """
    if damage := find_release_damage(directory):
        recipe_name = _recipe_of(directory)
        other = _newest_other_intact(directory)
        another = (
            f"Use another release (mllm-assets releases rollback {recipe_name} {other}), or"
            if other
            else "No other release of it is intact;"
        )
        raise IntegrityError(
            f"{directory} is not what was released: {damage}. {another} make a new version of the same "
            f"checkpoint: {materialize_command(f'{recipe_name}/released_model')}"
        )


def _newest_other_intact(directory: Path) -> str | None:
    """The newest other version of a release whose files have their sizes."""
    path = directory.resolve()
    if path.parent.parent.name != "releases":  # a copy
        return None
    others = [other for other in path.parent.glob("v*") if version_number(other.name) and other != path]
    intact = [other.name for other in others if find_release_damage(other, deep=False) is None]
    return max(intact, key=version_number, default=None)


def _recipe_of(directory: Path) -> str:
    path = directory.resolve()
    if path.parent.parent.name == "releases":
        return path.parent.name
    try:
        return read_manifest(path)["recipe"]  # of a copy
    except (IntegrityError, KeyError):
        return "RECIPE"


def seal(directory: Path, payload: Mapping[str, Any], digest: Callable[[Path], str] = sha256_file) -> dict[str, Any]:
    """Write a release's manifest, and take the write permission off all files.

    Large files share their blocks, and so their permissions, with the run that they were made by. Folders stay
    writable: whoever wants a release gone deletes its folder.
    """
    manifest = write_manifest(directory, payload, digest=digest)
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode & ~0o222)
    return manifest
