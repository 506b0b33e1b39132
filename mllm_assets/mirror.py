"""What of a project is in the artefact store, and how it comes back on another machine.

Datasets are versions with the images that they name, their entries and their history in DuckDB; features are shards;
releases have a current one among them. Everything else is one artefact. Sources and pretrained models are not mirrored.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import is_complete, point_symlink, sha256_file, write_text_atomic
from mllm_assets.data.dataset_info import write_entries
from mllm_assets.data.publish import IMAGE_LIST, claims_file, listed_images, note_claims
from mllm_assets.evaluation.release_versions import find_release, make_current, releases_lock
from mllm_assets.layout import Layout
from mllm_assets.quality.history import read_history, write_history
from mllm_assets.quality.store import QualityStore
from mllm_assets.store import Sent, Store

FOLLOWED = "followed.txt"  # beside a dataset's versions: the one that was linked because the store said so


@dataclass(frozen=True, slots=True)
class Mirror:
    """A project and its store; `say` is told what was sent and fetched."""

    store: Store
    layout: Layout
    say: Callable[[str], None] = lambda text: None

    def push(self, directory: Path) -> None:
        """Send what an asset made: an artefact, or a folder of artefacts such as the shards of features."""
        pushed = [directory] if is_complete(directory) else [path for path in _children(directory) if is_complete(path)]
        self._told(directory, [self.store.push(path) for path in pushed])

    def bring(self, directory: Path) -> bool:
        """Fetch what `push` sent, unless it is here; returns whether it is here now."""
        if not is_complete(directory) and not self._fetch(directory):
            name = self.layout.relative(directory)
            for part in self.store.names(name):
                self._fetch(self.layout.root / part)
            return directory.is_dir()  # never without a part in it
        if (directory / IMAGE_LIST).is_file():
            self._bring_images(directory)
        return True

    def push_split(self, version: Path) -> None:
        """Send a dataset's version: its images first, so that whoever sees the version can have them."""
        if self.store.holds(version):
            return
        images = {image_id: self.layout.data / name for name, image_id in listed_images(version)}
        self._told(version, [self.store.push_files(images), self.store.push(version)])

    def push_entries(self, dataset: str, digest: str, entries: Mapping[str, Any]) -> None:
        """Say what `dataset_info` of this digest is: the version that the dataset's link points to, and its entries."""
        version = self.layout.relative((self.layout.data / dataset).resolve())
        self.store.point(f"entries/{dataset}/{digest}", {"version": version, "entries": dict(entries)})

    def bring_data(self, dataset: str, digest: str) -> None:
        """Let a dataset be here what `dataset_info` of this digest is, where it is not and the store has it.

        A version that was made here is left alone: its link is moved by the asset that makes splits.
        """
        said = self.store.pointer(f"entries/{dataset}/{digest}")
        if said is None:
            return
        version = self.layout.root / said["version"]
        followed = version.parent / FOLLOWED
        link = self.layout.data / dataset
        follows = followed.is_file() and link.resolve().name == followed.read_text(encoding="utf-8")
        if is_complete(version) and link.is_symlink() and not follows:
            return
        self.bring(version)
        write_entries(self.layout, dataset, said["entries"])
        write_text_atomic(followed, version.name)
        point_symlink(link, version)

    def push_history(self, dataset: str) -> None:
        """Send what DuckDB knows of a dataset, as Parquet; the newest is what `bring_history` fetches."""
        folder = self.layout.history(dataset)
        directory = write_history(QualityStore(self.layout.quality_db), dataset, folder)
        self.push(directory)
        self.store.point(f"history/{dataset}", {"path": self.layout.relative(directory)})
        _keep_only(directory)

    def bring_history(self, dataset: str) -> None:
        """Add to DuckDB what another machine knew of a dataset, before it is judged and split here."""
        said = self.store.pointer(f"history/{dataset}")
        if said is None or is_complete(directory := self.layout.root / said["path"]):
            return
        self._fetch(directory)
        read_history(QualityStore(self.layout.quality_db), directory)
        _keep_only(directory)

    def push_features(self, recipe: str, directory: Path) -> None:
        """Send the shards of a tower, and say that a recipe uses it."""
        self.push(directory)
        self.store.point(f"features/{recipe}", {"path": self.layout.relative(directory)})

    def bring_features(self, recipe: str) -> None:
        """Fetch the shards that a recipe used last; of another tower they are not read."""
        if said := self.store.pointer(f"features/{recipe}"):
            self.bring(self.layout.root / said["path"])

    def push_run(self, directory: Path) -> None:
        """Send a finished run, and say that it is the latest of its folder."""
        self.push(directory)
        self.store.point(f"{self.layout.relative(directory.parent)}/latest", {"run": directory.name})

    def bring_runs(self, directory: Path) -> bool:
        """Fetch the finished runs that a fingerprint names, the forced ones too; returns whether there was one."""
        names = self.store.names(self.layout.relative(directory.parent))
        fingerprint = directory.name.split("-")[0]
        wanted = [name for name in names if re.fullmatch(rf"{fingerprint}(-\d+)?", name.rsplit("/", 1)[-1])]
        return any([self._fetch(self.layout.root / name) for name in wanted])  # a list: each is fetched

    def push_current(self, recipe: str) -> None:
        """Say which release is the current one."""
        release = find_release(self.layout, recipe)
        self.store.point(f"releases/{recipe}/current", {"version": release.version})

    def follow_current(self, recipe: str, *, all_versions: bool = False) -> None:
        """Let the store's current release be the current one here; `all_versions` fetches the others too."""
        said = self.store.pointer(f"releases/{recipe}/current")
        if said is None:
            return
        folder = self.layout.releases(recipe)
        versions = [folder / said["version"]]
        if all_versions:
            versions += [self.layout.root / name for name in self.store.names(self.layout.relative(folder))]
        with releases_lock(self.layout, recipe):
            for version in versions:
                self._fetch(version)
            make_current(self.layout, find_release(self.layout, recipe, said["version"]))

    def _fetch(self, directory: Path) -> bool:
        if is_complete(directory):
            return True
        if not self.store.fetch(directory):
            return False
        self.say(f"{self.layout.relative(directory)} was fetched from {self.store.url}.")
        if directory.parent.parent == self.layout.outputs:
            said = self.store.pointer(f"{self.layout.relative(directory.parent)}/latest")
            if said is not None and said["run"] == directory.name:
                point_symlink(directory.parent / "latest", directory)
        return True

    def _bring_images(self, version: Path) -> None:
        """An image that is named by content is what its name says; another may be that of another version."""
        missing: dict[Path, str] = {}
        for name, image_id in listed_images(version):
            path = self.layout.data / name
            is_named_by_content = path.stem == image_id[:16]
            if not path.is_file() or (not is_named_by_content and sha256_file(path) != image_id):
                missing[path] = image_id
        chosen = [path for path, image_id in missing.items() if path.stem != image_id[:16]]
        if chosen:
            names = [path.relative_to(self.layout.data).as_posix() for path in chosen]
            note_claims(claims_file(self.layout, version.parent.name), names)
        self.store.fetch_files(missing)

    def _told(self, directory: Path, sent: list[Sent]) -> None:
        if num_objects := sum(part.num_objects for part in sent):
            mib = sum(part.num_bytes for part in sent) / 2**20
            name = self.layout.relative(directory)
            self.say(f"{name}: {num_objects} files, {mib:.2f} MiB, went to {self.store.url}.")


def _children(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if not path.name.startswith("."))


def _keep_only(directory: Path) -> None:
    """A history holds the earlier ones."""
    for path in _children(directory.parent):
        if path != directory:
            shutil.rmtree(path)
