"""What the artefact store has of a project, and how another machine gets it.

Datasets are versions with the images that they name, their entries and their history in DuckDB; features are shards;
releases have a current one among them. Everything else is one artefact. Sources and pretrained models are not mirrored.
"""

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import (
    Manifest,
    is_complete,
    point_symlink,
    read_manifest,
    require_name,
    sha256_file,
    write_text_atomic,
)
from mllm_assets.data.curate.publish import ImageClaims
from mllm_assets.data.curate.register import info_digest, write_entries
from mllm_assets.data.quality.record import delete_others, read_history, write_history
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.sharegpt.dataset import IMAGE_LIST, listed_images
from mllm_assets.errors import IntegrityError
from mllm_assets.layout import Layout
from mllm_assets.releases.versions import find_release, make_current, releases_lock, version_number
from mllm_assets.store.objects import Sent, Store

FOLLOWED = "followed.txt"  # in the folder of a dataset's versions: the one that is linked because the store names it


@dataclass(frozen=True, slots=True)
class Mirror:
    """A project and its store; `notify` is called with what was sent and fetched."""

    store: Store
    layout: Layout
    notify: Callable[[str], None] = lambda text: None

    def push(self, directory: Path) -> None:
        """Send what an asset made: an artefact, or a folder of artefacts such as the shards of features."""
        parts = [directory] if is_complete(directory) else sorted(directory.glob("[!.]*"))
        self._notify_sent(directory, [self.store.push(path) for path in parts if is_complete(path)])

    def pull(self, directory: Path) -> bool:
        """Fetch what `push` sent, unless it is here; return whether it is here now."""
        if not is_complete(directory) and not self._fetch(directory):
            name = self.layout.relative(directory)
            for part in self.store.names(name):
                self._fetch(self.layout.root / part)
            return directory.is_dir()  # never without a part in it
        if (directory / IMAGE_LIST).is_file():
            self._pull_images(directory)
        return True

    def push_split(self, version: Path) -> None:
        """Send a dataset's version: its images first, so that whoever sees the version can have them."""
        if self.store.holds(version):
            return
        images = {image_id: self.layout.data / name for name, image_id in listed_images(version)}
        self._notify_sent(version, [self.store.push_files(images), self.store.push(version)])

    def push_entries(self, dataset: str, digest: str, entries: Mapping[str, Any]) -> None:
        """Record the version that the dataset's link points to, and its entries, under the digest of `dataset_info`."""
        version = self.layout.relative((self.layout.data / dataset).resolve())
        self.store.point(f"entries/{dataset}/{digest}", {"version": version, "entries": dict(entries)})

    def pull_data(self, dataset: str, digest: str) -> None:
        """Switch a dataset to the version whose `dataset_info` has this digest, if the store has it.

        A version that was made here is left alone: its link is moved by the asset that makes splits.
        """
        pointer = f"entries/{dataset}/{digest}"
        value, version = self._read_pointer(pointer, "version", self.layout.version(dataset, digest).parent)
        if value is None:
            return
        followed = version.parent / FOLLOWED
        link = self.layout.data / dataset
        follows = followed.is_file() and link.resolve().name == followed.read_text(encoding="utf-8")
        if is_complete(version) and link.is_symlink() and not follows:
            return

        def check(place: Path) -> None:
            if info_digest(value["entries"], place) != digest:
                raise self._refusal(pointer, "entries or a version that are not those of this digest")

        self._require(version, pointer, check)
        check(version)  # also if it was here before
        self._pull_images(version)
        write_entries(self.layout, dataset, value["entries"])
        write_text_atomic(followed, version.name)
        point_symlink(link, version)

    def push_history(self, dataset: str) -> None:
        """Send a dataset's rows in DuckDB, as Parquet; `pull_history` fetches the newest."""
        folder = self.layout.history(dataset)
        directory = write_history(QualityStore(self.layout.quality_db), dataset, folder)
        self.push(directory)
        self.store.point(f"history/{dataset}", {"path": self.layout.relative(directory)})
        delete_others(directory)

    def pull_history(self, dataset: str) -> None:
        """Add another machine's rows of a dataset to DuckDB, before it is judged and split here."""
        value, directory = self._read_pointer(f"history/{dataset}", "path", self.layout.history(dataset))
        if value is None or is_complete(directory):
            return
        store = QualityStore(self.layout.quality_db)
        # before it counts as fetched: what was refused or interrupted is read the next time
        self._require(directory, f"history/{dataset}", lambda staging: read_history(store, dataset, staging))
        delete_others(directory)

    def push_features(self, recipe: str, directory: Path) -> None:
        """Send the shards of a tower, and record that a recipe uses it."""
        self.push(directory)
        self.store.point(f"features/{recipe}", {"path": self.layout.relative(directory)})

    def pull_features(self, recipe: str) -> None:
        """Fetch the shards that a recipe used last; those of another tower are not read."""
        value, directory = self._read_pointer(f"features/{recipe}", "path", self.layout.features)
        if value is not None:
            self.pull(directory)

    def push_run(self, directory: Path) -> None:
        """Send a finished run, and record that it is the latest of its folder."""
        self.push(directory)
        if not read_manifest(directory).get("overrides"):
            self.store.point(f"{self.layout.relative(directory.parent)}/latest", {"run": directory.name})

    def pull_runs(self, directory: Path) -> bool:
        """Fetch the finished runs that a fingerprint names, the forced ones too; return whether one was fetched."""
        names = self.store.names(self.layout.relative(directory.parent))
        fingerprint = directory.name.split("-")[0]
        wanted = [name for name in names if re.fullmatch(rf"{fingerprint}(-\d+)?", name.rsplit("/", 1)[-1])]
        return any([self._fetch(self.layout.root / name) for name in wanted])  # a list: each is fetched

    def push_current(self, recipe: str) -> None:
        """Record which release is the current one."""
        release = find_release(self.layout, recipe)
        self.store.point(f"releases/{recipe}/current", {"version": release.version})

    def follow_current(self, recipe: str, *, all_versions: bool = False) -> None:
        """Make the store's current release the current one here; `all_versions` fetches the others too."""
        pointer, folder = f"releases/{recipe}/current", self.layout.releases(recipe)
        value, current = self._read_pointer(pointer, "version", folder, base=folder)
        if value is None:
            return
        versions = [current]
        if all_versions:
            versions += [self.layout.root / name for name in self.store.names(self.layout.relative(folder))]
        if strange := [version.name for version in versions if not version_number(version.name)]:
            raise self._refusal(pointer, f"the release {strange[0]!r}, which is not a version")
        with releases_lock(self.layout, recipe):
            for version in versions:
                self._fetch(version)
            make_current(self.layout, find_release(self.layout, recipe, current.name))

    def _read_pointer(
        self, pointer: str, key: str, folder: Path, *, base: Path | None = None
    ) -> tuple[Manifest | None, Path]:
        """The value of a pointer, and the path in it: a direct child of the one folder that its kind owns."""
        value = self.store.pointer(pointer)
        if value is None:
            return None, folder
        path = (base or self.layout.root) / require_name(value[key], what=f"{self.store.url}/pointers/{pointer}.json")
        if path.parent != folder or path.name.startswith("."):
            shown = self.layout.relative(folder)
            raise self._refusal(pointer, f"{value[key]!r}, expected a folder right below {shown}")
        return value, path

    def _require(self, directory: Path, pointer: str, check: Callable[[Path], None]) -> None:
        if not self._fetch(directory, check):
            raise self._refusal(pointer, f"{self.layout.relative(directory)}, which the store does not hold")

    def _refusal(self, pointer: str, what: str) -> IntegrityError:
        return IntegrityError(
            f"{self.store.url}/pointers/{pointer}.json names {what}, so nothing of it was used. Delete it, and "
            "materialise its asset again where it was made."
        )

    def _fetch(self, directory: Path, check: Callable[[Path], None] = lambda staging: None) -> bool:
        if is_complete(directory):
            return True

        def check_all(staging: Path) -> None:
            if (staging / IMAGE_LIST).is_file():
                deque(listed_images(staging), maxlen=0)
            check(staging)

        if not self.store.fetch(directory, check_all):
            return False
        self.notify(f"{self.layout.relative(directory)} was fetched from {self.store.url}.")
        if directory.parent.parent == self.layout.outputs:
            latest = self.store.pointer(f"{self.layout.relative(directory.parent)}/latest")
            if latest is not None and latest.get("run") == directory.name:
                point_symlink(directory.parent / "latest", directory)
        return True

    def _pull_images(self, version: Path) -> None:
        """Fetch missing images; one that is not named by its content may be of another version, so it is hashed."""
        missing: dict[Path, str] = {}
        for name, image_id in listed_images(version):
            path = self.layout.data / name
            is_named_by_content = path.stem == image_id[:16]
            if not path.is_file() or (not is_named_by_content and sha256_file(path) != image_id):
                missing[path] = image_id
        chosen = [path for path, image_id in missing.items() if path.stem != image_id[:16]]
        if chosen:
            ImageClaims(self.layout, version.parent.name).add(f"images/{path.name}" for path in chosen)
        self.store.fetch_files(missing)

    def _notify_sent(self, directory: Path, sent: list[Sent]) -> None:
        if num_objects := sum(part.num_objects for part in sent):
            mib = sum(part.num_bytes for part in sent) / 2**20
            name = self.layout.relative(directory)
            self.notify(f"{name}: {num_objects} files, {mib:.2f} MiB, went to {self.store.url}.")
