"""Write a split: images named by content or by number, and the rows that name them."""

import os
import stat
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from mllm_assets.artifacts import move_aside
from mllm_assets.data.ingest.images import EXTENSIONS, published_bytes, sha256
from mllm_assets.data.ingest.source_rows import HISTORY
from mllm_assets.data.ingest.source_rows import SYSTEM as SYSTEM_FIELD
from mllm_assets.data.ingest.spec import DatasetSpec
from mllm_assets.data.ingest.split_spec import SIDES
from mllm_assets.data.ingest.templates import render
from mllm_assets.data.quality.verdicts import render_answer, texts_of
from mllm_assets.data.sharegpt.conversation import SYSTEM, as_conversation, read_conversation, with_placeholders
from mllm_assets.errors import DataError
from mllm_assets.layout import Layout

NAMED_IMAGES = "named_images.txt"
_WRITTEN = pa.schema([("name", pa.string()), ("image_id", pa.string())])
MAX_REMEMBERED = 8192


class ImageWriter:
    """Writes images below `data/images/`; `write_list` says what each path holds.

    Named by content an image is on the disk once, whatever names it. With `output.image_prefix` the names are the
    original guide's, `naruto_train_000000.png`; they belong to one dataset, and nobody else's file is replaced.
    """

    def __init__(self, spec: DatasetSpec, layout: Layout) -> None:
        self._rows: list[tuple[str, str]] = []
        self._written = _WRITTEN.empty_table()
        self._prefix = spec.output.image_prefix
        self._data = layout.data
        self._names: dict[str, str] = {}
        self._claims = ImageClaims(layout, spec.name)

    def write(self, data: bytes, source_id: str, number: str) -> str:
        """Publish one image and return its path relative to `data/`.

        `source_id` is the digest of the source's bytes, `number` the image's name after a prefix: "train_000000".

        Raises:
            DataError: A file of that name is not this dataset's.
        """
        if self._prefix is None:
            if source_id in self._names:
                return self._names[source_id]
            if (name := self._passed_before(data, source_id)) is not None:
                return self._remember(name, source_id, source_id)
        content, extension = published_bytes(data)
        image_id = source_id if content is data else sha256(content)
        stem = image_id[:16] if self._prefix is None else f"{self._prefix}_{number}"
        name = f"images/{stem}.{extension}"
        if self._prefix is not None:
            self._claims.add([name], image_id=image_id)
        _write_image(self._data / name, content)
        return self._remember(name, image_id, source_id)

    def _passed_before(self, data: bytes, source_id: str) -> str | None:
        """The file that has exactly these bytes already, if any: they need not be decoded again."""
        names = (f"images/{source_id[:16]}.{extension}" for extension in EXTENSIONS.values())
        return next((name for name in names if _is_in_place(f"{self._data}/{name}", data)), None)

    def _remember(self, name: str, image_id: str, source_id: str) -> str:
        if len(self._names) == MAX_REMEMBERED:
            self._names.clear()  # an image that comes again later is compared with its file
        self._names[source_id] = name
        self._rows.append((name, image_id))
        if len(self._rows) == MAX_REMEMBERED:
            self._keep_rows()
        return name

    def write_list(self, path: Path) -> None:
        """Write the digest of each path below `data/`, by path, as `sha256sum --check` reads it."""
        self._keep_rows()
        previous = None
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for batch in self._written.sort_by("name").to_batches(max_chunksize=MAX_REMEMBERED):
                for row in zip(batch["name"].to_pylist(), batch["image_id"].to_pylist(), strict=True):
                    if row != previous:
                        file.write(f"{row[1]}  {row[0]}\n")
                    previous = row

    def _keep_rows(self) -> None:
        """Keep the rows as columns, which take a quarter of the memory."""
        columns = [list(column) for column in zip(*self._rows, strict=True)] or [[], []]
        self._written = pa.concat_tables([self._written, pa.table(columns, schema=_WRITTEN)])
        self._rows.clear()


class ImageClaims:
    """The images that a dataset may replace, because it wrote them: their names, kept next to its versions."""

    def __init__(self, layout: Layout, dataset: str) -> None:
        self._data, self._file = layout.data, layout.version(dataset, NAMED_IMAGES)
        self._names = set(self._file.read_text(encoding="utf-8").split("\n")) if self._file.is_file() else set()

    def add(self, names: Iterable[str], *, image_id: str | None = None) -> None:
        """Claim names below `data/` before the images are written: after a crash they are still known to be ours.

        Raises:
            DataError: A file of that name exists, is not this dataset's, and has another digest than `image_id`.
        """
        new = [name for name in names if name not in self._names]
        if not new:
            return
        for path in (self._data / name for name in new):
            if path.exists() and (image_id is None or sha256(path.read_bytes()) != image_id):
                raise DataError(
                    f"{path} exists and is not this dataset's, so it is not replaced. Set another output.image_prefix "
                    "in the dataset's YAML, or move the file away."
                )
        self._names.update(new)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.writelines(f"{name}\n" for name in new)


def image_number(side: str, position: int, index: int = 0) -> str:
    """`train_000000`; further images of a sample are `train_000000_1` and so on."""
    return f"{side}_{position:06d}" + (f"_{index}" if index else "")


def build_row(spec: DatasetSpec, sample: Mapping[str, Any], position: int, image_paths: list[str]) -> dict[str, Any]:
    """One ShareGPT row: the source's own conversation, or a prompt (in turn by position) with the answer.

    LLaMA-Factory ignores `id`, `label` and `original_id`, the source's own id.
    """
    row = {"messages": row_messages(spec, sample, position, len(image_paths)), "images": image_paths}
    row["id"] = sample["sample_id"]
    if spec.source.label_column is not None:
        # as the answer shows it, so that the two can be compared
        row["label"] = (sample["label"] or "").replace("_", " ")
    elif sample["label"] is not None:
        row["label"] = sample["label"]
    if sample["source_id"] is not None:
        row["original_id"] = sample["source_id"]
    return row


def row_messages(spec: DatasetSpec, sample: Mapping[str, Any], position: int, num_images: int) -> list[dict[str, str]]:
    """The turns of `build_row`."""
    texts = texts_of(sample)
    if sample["messages"] is not None:
        messages = with_placeholders(read_conversation(sample["messages"]), num_images)
    else:
        asked = render(spec.prompts[position % len(spec.prompts)], texts)
        before = texts.get(HISTORY)
        messages = with_placeholders(
            [
                *(read_conversation(as_conversation(before).messages) if before else []),
                {"role": "user", "content": asked},
                {"role": "assistant", "content": render_answer(sample, spec)},
            ],
            num_images,
        )
    system = texts.get(SYSTEM_FIELD) or spec.system
    if system is not None and messages[0]["role"] != SYSTEM:
        messages = [{"role": SYSTEM, "content": system}, *messages]
    return messages


def split_file(side: str, format: str) -> str:
    """The name of a side's file in a version: `train.json`."""
    return f"{side}.{format}"


def side_files(version_dir: Path, format: str) -> dict[str, Path]:
    """The file of each side that a version has: one without samples has none, nor has test in a version of before."""
    files = {side: version_dir / split_file(side, format) for side in SIDES}
    return {side: path for side, path in files.items() if path.is_file()}


def _is_in_place(path: str | Path, content: bytes) -> bool:
    """Whether a file exists and is complete; if so it is in use from now on."""
    try:
        found = os.stat(path)
    except OSError:  # also a link that leads to itself
        return False
    if not stat.S_ISREG(found.st_mode) or found.st_size != len(content):
        return False
    file = os.open(path, os.O_RDONLY)  # a fifth cheaper than a file object, for each picture of a dataset
    try:
        if os.read(file, len(content) + 1) != content:
            return False
        # The rows that name it come later; until then its time of change tells `mllm-assets gc` that it is in use
        os.utime(file, ns=(time.time_ns(), found.st_mtime_ns))
    finally:
        os.close(file)
    return True


def _write_image(path: Path, content: bytes) -> None:
    """Write a file unless it exists and is complete."""
    if _is_in_place(path, content):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        move_aside(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
