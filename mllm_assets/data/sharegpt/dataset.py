"""LLaMA-Factory's data directory: each file is parsed once and each image hashed once, and handed on.

The version's `images.sha256` records each image's digest when the dataset was published. A planner names runs by that
record and reads no image; the worker that uses the images reads and compares them.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import digest_json, is_complete, is_digest, require_sound, resolved_path
from mllm_assets.data.sharegpt.entries import entry_file, load_entry
from mllm_assets.data.sharegpt.media import media_folders
from mllm_assets.data.sharegpt.overview import Overview, kept_overview
from mllm_assets.data.sharegpt.parsing import unparsed_rows
from mllm_assets.data.sharegpt.pictures import MediaFolders
from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.errors import DataError, IntegrityError, all_of
from mllm_assets.file_digests import FileDigests, remember, remembered
from mllm_assets.layout import Layout
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.worker.tasks import WHOLE, Part

IMAGE_LIST = "images.sha256"


class Dataset:
    """A `dataset_dir`, its entries and the digests of its files.

    Args:
        data_dir: The folder of `dataset_info.json`.
        media_dir: The folder that image paths are relative to, if it is another one.
        read_part: Of the images whose digests are recorded, those to read; of the others, which another process reads,
            the record is taken. None takes the record of all. By default all are read.
        digests: Those of files that were read before.
        rows_root: Where it is kept what rows were found to be.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        media_dir: Path | None = None,
        read_part: Part | None = WHOLE,
        digests: FileDigests | None = None,
        rows_root: Path | None = None,
    ) -> None:
        self.data_dir = data_dir
        self.rows_root = rows_root
        self.media_dir = media_dir
        self.folder = resolved_path(Path(), data_dir, what="dataset_dir")
        self.digests = digests or FileDigests()
        self._read_part = read_part
        self._entries: dict[str, Entry] = {}
        self._others: dict[tuple[Path, Path | None], Dataset] = {}

    @classmethod
    def of_recipe(cls, spec: TrainSpec, root: Path, *, read_part: Part | None = WHOLE) -> "Dataset":
        """What a recipe of the project at `root` reads."""
        media_dir, rows_root = media_dir_of(spec, root), Layout(root).rows
        return cls(root / spec.dataset_dir, media_dir=media_dir, read_part=read_part, rows_root=rows_root)

    def entry(self, name: str) -> "Entry":
        """One entry of `dataset_info.json`.

        Raises:
            RecipeError: No entry has this name; names the nearest.
            DataError: `dataset_info.json` is missing or wrong.
        """
        if name not in self._entries:
            self._entries[name] = Entry(self, name)
        return self._entries[name]

    def at(self, data_dir: Path, media_dir: Path | None = None) -> "Dataset":
        """The directory that an earlier stage read, usually this one."""
        if data_dir.resolve() == self.folder and media_dir == self.media_dir:
            return self
        if (data_dir, media_dir) not in self._others:
            self._others[data_dir, media_dir] = Dataset(
                data_dir,
                media_dir=media_dir,
                read_part=self._read_part,
                digests=self.digests,
                rows_root=self.rows_root,
            )
        return self._others[data_dir, media_dir]

    def digest_image(self, path: Path, recorded: str | None) -> str:
        """An image's digest, read or taken from the record."""
        part = self._read_part
        if recorded is None or (part is not None and int(recorded[:8], 16) % part.count == part.index):
            return self.digests.of(path)
        return self.digests.take(path, recorded)


class Entry:
    """One entry of a dataset: its rows, its images and its digest, each found on first use."""

    def __init__(self, dataset: Dataset, name: str) -> None:
        self.dataset, self.name = dataset, name
        self.info = load_entry(dataset.data_dir, name)
        self.file = entry_file(dataset.data_dir, self.info)

    def read(self, max_samples: int | None = None) -> list[Row]:
        """Read and validate all rows, or the first `max_samples`; raises as `unparsed`."""
        return [row() for row in islice(self._unparsed(), max_samples)]

    def each(self) -> Iterator[Row]:
        """Every row in turn, read anew at each call, so that none stays in memory; raises as `unparsed`."""
        return (row() for row in self.unparsed())

    def unparsed(self) -> Iterator[Callable[[], Row]]:
        """Every row in turn, each parsed when it is called, so that rows that nobody wants take little time.

        Raises:
            DataError: The file is not JSON (names the line), or a row's roles, placeholders or images are wrong (names
                file, row and id).
            IntegrityError: It was published here, and changed since; or it changes while it is read.
        """
        try:
            files = self.file_digests
        except OSError:
            yield from self._unparsed()  # which names what is missing
            return
        yield from self._unparsed()
        self.dataset.digests.require_unchanged(files)

    def _unparsed(self) -> Iterator[Callable[[], Row]]:
        _ = self.version  # before a row of a damaged file is
        row = None
        for row in unparsed_rows(self.dataset.data_dir, self.info, self.dataset.media_dir, self._folders):
            yield partial(_right, row)
        if row is None:
            raise DataError(
                f"{self.file} has no rows, but entry {self.name!r} names it. Add samples or take it out of the recipe."
            )

    @cached_property
    def rows(self) -> list[Row]:
        """All rows, in memory from now on; raises as `each`."""
        return list(self.each())

    @cached_property
    def _overview(self) -> Overview:
        dataset, rows = self.dataset, self.__dict__.get("rows")
        if rows is not None or dataset.rows_root is None or dataset.media_dir is not None:
            return Overview.of(rows or self.each(), in_order=dataset.media_dir is not None)
        try:
            source = [self.name, self._block, *self.file_digests.values()]
        except OSError:
            return Overview.of(self.each())  # which names what is missing
        _ = self.version  # a damaged one is refused before its file is believed
        return kept_overview(
            dataset.rows_root, source, dataset.folder, self.each, is_lasting=lambda: self._folders.are_plain
        )

    @cached_property
    def _folders(self) -> MediaFolders:
        return media_folders(self.dataset.data_dir, self.dataset.media_dir)

    @property
    def num_rows(self) -> int:
        """How many rows there are; raises as `each`."""
        return self._overview.num_rows

    @property
    def num_alike(self) -> int:
        """How many rows, from the first on, have the same last answer; raises as `each`."""
        return self._overview.num_alike

    @cached_property
    def file_digests(self) -> dict[Path, str]:
        """The digest of each file that holds rows."""
        files = sorted(part for part in self.file.iterdir() if part.is_file()) if self.file.is_dir() else [self.file]
        self.dataset.digests.take_untouched(remembered(self.file))
        return {path: self.dataset.digests.of(path) for path in files}

    @property
    def answers(self) -> list[str]:
        """What the assistant says last in each row, but for what is marked as a bad answer."""
        return [row.messages[-1].content for row in self.each() if row.mark is not False]

    @cached_property
    def version(self) -> Path | None:
        """The published version that holds the entry's file; None for an external entry.

        Raises:
            IntegrityError: The file, the record of its images or the manifest is not as it was published.
        """
        folder = self.file.parent
        is_ours = folder.parent.parent.name == ".versions"
        if not is_ours and not (is_complete(folder) and (folder / IMAGE_LIST).is_file()):
            return None
        name = f"{folder.parent.name}/train" if is_ours else "the dataset's train asset"
        digests, only = self.dataset.digests, [self.file.name, IMAGE_LIST]
        digests.take_untouched(remembered(folder))
        require_sound(folder, f"Materialise {name} again.", only=only, digest=digests.of)
        remember(digests.states(folder))
        return folder

    @cached_property
    def recorded(self) -> dict[Path, str]:
        """The digest of each image when the entry's dataset was published, by path in order; empty without a record."""
        if self.version is None or not (self.version / IMAGE_LIST).is_file():
            return {}
        listed = {f"{self.dataset.folder}/{name}": digest for name, digest in listed_images(self.version)}
        return {path: digest for path in self._overview.images if (digest := listed.get(str(path)))}

    @cached_property
    def images(self) -> dict[Path, str]:
        """The digest of each image that a row names, by path in order."""
        return {path: self.dataset.digest_image(path, self.recorded.get(path)) for path in self._overview.images}

    @cached_property
    def videos(self) -> dict[Path, str]:
        """The digest of each video that a row names, by path in order."""
        return {path: self.dataset.digests.of(path) for path in self._overview.videos}

    @cached_property
    def digest(self) -> str:
        """16 hex digits that cover the entry, its file and every image and video that it names."""
        images = list(self.images.values())  # by name, so that swapping two images changes it
        if self.dataset.media_dir:  # a name alone does not say in which of two folders it is
            images = [images[place] for place in self._overview.order]
        videos = [list(self.videos.values())] if self.videos else []
        return digest_json([self._block, *self.file_digests.values(), images, *videos])[:16]

    @property
    def _block(self) -> dict[str, Any]:
        info = self.info
        return {"formatting": info.formatting, "columns": dict(info.columns), "tags": dict(info.tags)}

    @property
    def identity(self) -> list[str]:
        """What its rows are, their ids included, and where their pictures are relative to the dataset."""
        media_dir = self.dataset.media_dir
        return [self.name, self.digest, *([os.path.relpath(media_dir, self.dataset.folder)] if media_dir else [])]

    def require_unchanged(self, expected: str | None = None) -> None:
        """Refuse images that changed since they were published, and an entry that changed since a run was named by it.

        Raises:
            IntegrityError: Names the image, or the entry if its images have no record.
        """
        for path, digest in self.recorded.items():
            if self.images[path] != digest:
                raise IntegrityError(
                    f"The image {path} of entry {self.name} changed after its dataset was published: expected digest "
                    f"{digest[:12]}, found {self.images[path][:12]}. Materialise the dataset's train asset again: it "
                    f"writes the image again."
                )
        if expected is not None and self.digest != expected:
            raise IntegrityError(
                f"The entry {self.name} in {self.dataset.data_dir} changed after this run was named by its content: "
                f"expected digest {expected[:12]}, found {self.digest[:12]}. Start the run again: it gets a name of "
                f"its own."
            )


def _right(parse: Callable[[], tuple[Row | None, list[str]]]) -> Row:
    row, problems = parse()
    if problems:
        raise DataError(all_of(problems))
    assert row is not None  # no problem
    return row


def media_dir_of(spec: TrainSpec, root: Path) -> Path | None:
    """The folder that a recipe's `media_dir` names."""
    return None if spec.media_dir is None else root / spec.media_dir


def entry_digests(data_dir: Path, names: Iterable[str]) -> dict[str, str]:
    """The digests of entries by name, their images as their datasets recorded them."""
    dataset = Dataset(data_dir, read_part=None)
    return {name: dataset.entry(name).digest for name in names}


def listed_images(version_dir: Path) -> Iterator[tuple[str, str]]:
    """The path below `data/` and the digest of each image of a version.

    Raises:
        IntegrityError: A line is not one that `ImageWriter.write_list` writes.
    """
    path = version_dir / IMAGE_LIST
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            image_id, _, name = line.rstrip("\n").partition("  ")
            if not is_digest(image_id) or re.fullmatch(r"images/[^/.\x00-\x1f][^/\x00-\x1f]{0,240}", name) is None:
                raise IntegrityError(
                    f"{path}, line {number}: expected a sha256, two spaces and a file right below images/, found "
                    f"{line[:120]!r}. Delete that version, here and in the artefact store, and materialise the "
                    f"dataset's train asset again."
                )
            yield name, image_id
