"""Measure every distinct image of an ingested source once; images that DuckDB knows are not decoded again."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mllm_assets.data.ingest.flags import PROBES
from mllm_assets.data.ingest.raw_files import ImageIndex, open_raw, read_group_images
from mllm_assets.data.ingest.spec import DecodeLimits, QualitySpec
from mllm_assets.data.quality import decoding
from mllm_assets.data.quality.probes import OWN_FILES, PROBE_VERSION, ImageMeasurement, look_name, measure_image
from mllm_assets.data.quality.store import QualityStore, arrow_schema, table_for
from mllm_assets.data.quality.verdicts import image_flags, image_reject_reason, odd_size_limits
from mllm_assets.file_digests import FileDigests
from mllm_assets.progress import followed

COLUMNS = [field.name for field in fields(ImageMeasurement)]
SCHEMA = pa.schema([*(arrow_schema("image_quality").field(name) for name in COLUMNS), pa.field("look", pa.string())])
BATCH_IMAGES = 2048
BATCH_FILES = 8192
BATCH_IDS = 16_384  # per query
_VALUES = attrgetter(*COLUMNS)
# measurements that a limit cut short are not reused, since another spec may have other limits
_CUT_SHORT = (
    "image_too_many_bytes",
    "image_too_many_pixels",
    "image_too_many_frames",
    "image_decode_too_slow",
    "image_decoder_crashed",
)


@dataclass(frozen=True, slots=True)
class Images:
    """What verdicts need of U distinct images, in the order of `ImageIndex.ids`.

    Attributes:
        reasons_U: Why each cannot be used, an index into `reasons`; 0 where it can.
        flags_U: Bit b is set where the flag of the b-th of `PROBES` is.
        phash_U: Perceptual hashes.
        colors_UC: 4x4 RGB thumbnails, C = 48.
        num_decoded: How many were measured now.
    """

    reasons: list[str | None]
    reasons_U: NDArray[np.int16]
    flags_U: NDArray[np.uint32]
    phash_U: NDArray[np.uint64]
    colors_UC: NDArray[np.uint8]
    num_decoded: int


def measure_images(limits: QualitySpec, raw: Path, index: ImageIndex, store: QualityStore, target: Path) -> Images:
    """Write a row per image to `target`, and judge each; one row group of images is in memory at a time.

    Raises:
        IntegrityError: A page of `raw` does not match its checksum.
        MachineError: No process that decodes can be started.
    """
    is_known = _are_known(store, index.ids)
    num_unknown = int((~is_known).sum())
    measured = decoding.measure_images(_unmeasured(raw, index, is_known), limits.decode_limits)
    stored = _known_measurements(store, index.ids, is_known)
    judge = Judge(limits, len(index.ids))
    found = (next(stored if known else measured) for known in is_known.tolist())
    images_U = followed(found, "measure images", len(index.ids))
    with pq.ParquetWriter(target, SCHEMA) as writer:
        for first in range(0, len(index.ids), BATCH_IMAGES):
            images = list(islice(images_U, BATCH_IMAGES))
            judge.add(first, images)
            looks = [None if i.phash_64 is None else look_name(i.phash_64, i.color_48) for i in images]
            columns = zip(*map(_VALUES, images), strict=True)
            writer.write_table(pa.table([*map(list, columns), looks], schema=SCHEMA))
    return judge.finish(num_unknown)


def _unmeasured(raw: Path, index: ImageIndex, is_known: NDArray[np.bool_]) -> Iterator[bytes]:
    """The images that are not known, in the order of the index; row groups without one are not read."""
    with open_raw(raw) as file:
        for group in range(file.num_row_groups):
            first, last = index.group_images[group], index.group_images[group + 1]
            missing = first + np.flatnonzero(~is_known[first:last])
            if len(missing):
                images = read_group_images(file, group)
                numbers, places = np.unique(index.of_group(group), return_index=True)
                for place in places[np.searchsorted(numbers, missing)].tolist():
                    yield images[place].as_py() or b""


def measure_files(
    paths: Sequence[Path], limits: DecodeLimits, store: QualityStore | None, digests: FileDigests | None = None
) -> list[ImageMeasurement]:
    """Measure files by their present content; one that is missing has the defect "image_missing".

    Each is hashed unless `digests` knows it, and decoded unless `store` has measurements of such bytes from an earlier
    run; it gets the new ones. Without a store every file is decoded.
    """
    digests = digests or FileDigests()
    ids = [digests.of(path) if path.is_file() else None for path in paths]
    known: dict[str | None, ImageMeasurement] = {}
    if store is not None:
        names = pa.array(sorted({name for name in ids if name}), pa.string())
        found = _known_measurements(store, names, np.ones(len(names), bool))
        known = {image.image_sha256: image for image in found if image.defect is None}
    unknown = {name: path for name, path in zip(ids, paths, strict=True) if name is not None and name not in known}
    contents = (path.read_bytes() for path in unknown.values())
    measured = dict(zip(unknown, decoding.measure_images(contents, limits), strict=True))
    if store is not None:
        rows = [{**asdict(image), "probe_version": PROBE_VERSION} for image in measured.values() if not image.defect]
        if rows:
            store.write({"image_quality": table_for("image_quality", rows)})
    known |= {**measured, None: measure_image(None, limits)}
    return [known[name] for name in ids]


@dataclass(frozen=True, slots=True)
class FileLooks:
    """What N files look like, in the order measured; zeros where one is defective."""

    phash_N: NDArray[np.uint64]
    colors_NC: NDArray[np.uint8]
    defective: dict[int, ImageMeasurement]

    @property
    def whole_N(self) -> NDArray[np.bool_]:
        whole = np.ones(len(self.phash_N), bool)
        whole[list(self.defective)] = False
        return whole


def look_at_files(
    folder: Path,
    names: Sequence[str],
    store: QualityStore | None,
    digests: FileDigests | None = None,
) -> FileLooks:
    """What this project's files in a folder look like now; as `measure_files`, but only looks are kept in memory."""
    looks = FileLooks(np.zeros(len(names), np.uint64), np.zeros((len(names), 48), np.uint8), {})
    parts = (names[first : first + BATCH_FILES] for first in range(0, len(names), BATCH_FILES))
    measured = (measure_files([folder / name for name in part], OWN_FILES, store, digests) for part in parts)
    for number, image in enumerate(followed(chain.from_iterable(measured), "look at images", len(names))):
        if image.defect is not None or image.phash_64 is None or image.color_48 is None:
            looks.defective[number] = image
        else:
            looks.phash_N[number] = image.phash_64
            looks.colors_NC[number] = image.colors
    return looks


def _are_known(store: QualityStore, ids: pa.StringArray) -> NDArray[np.bool_]:
    """Which images have measurements of earlier runs."""
    known = np.zeros(len(ids), bool)
    for first in range(0, len(ids), BATCH_IDS):
        known[first + _known(store, ids[first : first + BATCH_IDS], ())["number"].to_numpy()] = True
    return known


def _known_measurements(
    store: QualityStore, ids: pa.StringArray, is_known: NDArray[np.bool_]
) -> Iterator[ImageMeasurement]:
    """Measurements of the known images, in the order of the ids; other processes may add more meanwhile."""
    for first in range(0, len(ids), BATCH_IDS):
        part = slice(first, first + BATCH_IDS)
        if not is_known[part].any():
            continue
        found = _known(store, ids[part].filter(pa.array(is_known[part])), COLUMNS).drop_columns(["number"])
        for batch in found.to_batches(max_chunksize=1024):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield ImageMeasurement(**dict(zip(COLUMNS, row, strict=True)))


def _known(store: QualityStore, ids: pa.StringArray, columns: Sequence[str]) -> pa.Table:
    return store.query_arrow(
        f"SELECT {', '.join(['number', *columns])} FROM image_quality JOIN wanted USING (image_sha256) "
        "WHERE probe_version = ? AND coalesce(defect, '') NOT IN (SELECT unnest(?)) ORDER BY number",
        [PROBE_VERSION, list(_CUT_SHORT)],
        given={"wanted": pa.table({"number": pa.array(np.arange(len(ids), dtype=np.int32)), "image_sha256": ids})},
    )


class Judge:
    """Collects verdicts image by image; odd sizes are known only at the end."""

    def __init__(self, limits: QualitySpec, num_images: int) -> None:
        self.limits = limits
        self.reasons: dict[str | None, int] = {None: 0}
        self.reasons_U = np.zeros(num_images, np.int16)
        self.flags_U = np.zeros(num_images, np.uint32)
        self.sizes_U = np.full(num_images, np.nan)
        self.phash_U = np.zeros(num_images, np.uint64)
        self.colors_UC = np.zeros((num_images, 48), np.uint8)

    def add(self, first: int, images: list[ImageMeasurement]) -> None:
        for number, image in enumerate(images, first):
            self._set_reason(number, image_reject_reason(image, self.limits))
            if image.defect is None and image.phash_64 is not None:
                assert image.width_px and image.height_px and image.color_48
                self.flags_U[number] = sum(map(_bit, image_flags(image, self.limits)))
                self.sizes_U[number] = math.sqrt(image.width_px * image.height_px)
                self.phash_U[number] = image.phash_64
                self.colors_UC[number] = image.colors

    def finish(self, num_decoded: int) -> Images:
        low, high = odd_size_limits(self.sizes_U, self.limits.max_odd_size_iqr)
        odd = (self.sizes_U < low) | (self.sizes_U > high)
        self.flags_U[odd] |= _bit("image_odd_size")
        for flag in self.limits.reject_flags:
            flagged = (self.reasons_U == 0) & (self.flags_U & _bit(flag) > 0)
            for number in np.flatnonzero(flagged).tolist():
                self._set_reason(number, flag)
        return Images(
            list(self.reasons), self.reasons_U, self.flags_U, self.phash_U, self.colors_UC, num_decoded=num_decoded
        )

    def _set_reason(self, number: int, reason: str | None) -> None:
        self.reasons_U[number] = self.reasons.setdefault(reason, len(self.reasons))


def _bit(flag: str) -> int:
    return 1 << list(PROBES).index(flag)


def flag_names(bits: int) -> list[Any]:
    """The flags of a bit field, sorted."""
    return sorted(flag for place, flag in enumerate(PROBES) if bits >> place & 1)
