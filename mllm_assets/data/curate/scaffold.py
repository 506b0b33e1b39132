"""Write a dataset's `defs.yaml` for a folder, whose contents are found by reading it once, as an ingest would."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from mllm_assets.artifacts import slug, write_text_atomic
from mllm_assets.data.curate.account import NUM_SHOWN, ShownRow, count_rows, show_first
from mllm_assets.data.curate.assign import NONE, assign
from mllm_assets.data.curate.inventory import take_inventory
from mllm_assets.data.curate.layouts import read_layout
from mllm_assets.data.curate.reading import Folder, Options, Reading
from mllm_assets.data.ingest.images import unsupported_format
from mllm_assets.data.ingest.raw_files import ImageIndex
from mllm_assets.data.ingest.source_rows import SourceRow
from mllm_assets.data.ingest.sources import raw_row, read_source
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.data.ingest.split_spec import MIN_TEST, SIDES, SplitSpec
from mllm_assets.data.quality.assess import reject_reasons
from mllm_assets.data.quality.decoding import measure_images
from mllm_assets.data.quality.groups import PerceptualHashes, group_samples
from mllm_assets.data.quality.measure import Judge
from mllm_assets.data.sharegpt.pictures import looks_like_picture
from mllm_assets.errors import DataError, RecipeError
from mllm_assets.progress import doing, followed
from mllm_assets.project.read import root_module

COMPONENT = "mllm_assets.components.ImageTextDataset"
VAL_SHARE = 0.1
# at most this many samples are decoded, spread evenly over all
MAX_CHECKED = 2000
SAFE_SHARE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """What was found among the checked samples.

    Attributes:
        num_checked: Samples that were decoded and judged.
        num_usable: Neither rejected nor a repeat of another.
        reject_reasons: How many will be rejected, by reason.
        first_rejected: Where the first sample of each reason is.
        num_train: Usable samples that can train when `num_val` of them validate.
        num_val: Usable samples that can validate, with no duplicate group on two sides.
        num_test: Usable samples that can test then; 0 where there are too few.
        first_usable: The numbers of the first of them among those that were checked.
    """

    num_checked: int
    num_usable: int
    reject_reasons: dict[str, int]
    first_rejected: dict[str, str]
    num_train: int
    num_val: int
    num_test: int
    first_usable: tuple[int, ...] = ()


def preview(spec: DatasetSpec, rows: Iterable[SourceRow], val_share: float) -> Preview:
    """Judge rows as `assess` would, and split them as `split` would; all texts and looks are in memory.

    The sizes of `spec` are ignored: `val_share` of the usable samples validate, and as many test where that is enough
    to judge by. Of few samples up to a fifth validate: a tenth of 30 tells no gain from chance, and releases nothing.
    """
    samples = _Samples()
    measured = list(measure_images(samples.collect(rows), spec.quality.decode_limits))
    judge = Judge(spec.quality, len(measured))
    judge.add(0, measured)
    images = judge.finish(len(measured))
    index = samples.index()
    reasons = reject_reasons(spec, samples.values, index, images)
    accepted = np.array([reason is None for reason in reasons], bool)
    ids = np.array([values["sample_id"] for values in samples.values], "S")
    num_usable = int((accepted & (np.char.find(ids, b"-") < 0)).sum()) if len(ids) else 0
    num_train = num_val = num_test = 0
    if num_usable > 1:
        num_val = max(1, round(val_share * num_usable), min(MIN_TEST, num_usable // 5))
        num_test = num_val if num_val >= MIN_TEST else 0
        num_train = num_usable - num_val - num_test
        sizes = replace(spec.split, num_train=num_train, num_val=num_val, num_test=num_test)
        hashes = PerceptualHashes(images.phash_U, images.colors_UC)
        assigned = assign(
            ids,
            accepted,
            lambda chosen: group_samples(index, hashes, chosen, spec.quality),
            sizes,
            np.full(len(ids), NONE, np.int8),
        )
        num_train, num_val, num_test = (int(assigned.of(side).sum()) for side in SIDES)
    first: dict[str, str] = {}
    for reason, values in zip(reasons, samples.values, strict=True):
        if reason is not None:
            unopened = (samples.unsupported.get(image) for image in values["image_ids"])
            detail = values["source_detail"] or next(filter(None, unopened), None)
            first.setdefault(reason, values["source_location"] + (f", {detail[:100]}" if detail else ""))
    return Preview(
        num_checked=len(reasons),
        num_usable=num_usable,
        reject_reasons=dict(sorted(Counter(filter(None, reasons)).items())),
        first_rejected=first,
        num_train=num_train,
        num_val=num_val,
        num_test=num_test,
        first_usable=tuple(np.flatnonzero(accepted)[:NUM_SHOWN].tolist()),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaffold:
    """A written `defs.yaml`, and what was found of all samples, or of `preview.num_checked` spread over them.

    `layout` and `columns` say how the folder is read, `shown` are rows as the model will see them, `files` accounts for
    every file, and `warnings` are about all answers and questions.
    """

    name: str
    path: Path
    num_samples: int
    preview: Preview
    entries: tuple[str, str]
    brings_split: bool
    has_test: bool
    layout: str
    columns: str
    shown: tuple[ShownRow, ...]
    files: tuple[str, ...]
    warnings: tuple[str, ...]


@doing("look at the folder")
def add_dataset(
    folder: Path, project: Path, root: Path, *, name: str | None = None, options: Options | None = None
) -> Scaffold:
    """Find out what a folder holds and declare it as a dataset, with a split that its usable samples can meet.

    Args:
        folder: Data in any layout that `layouts` knows.
        project: Where `pyproject.toml` names the package whose `defs/datasets/` gets the file.
        root: What relative paths are relative to (`MLLM_ASSETS_ROOT`).
        name: Name of the dataset; by default the folder's.
        options: What a person chose where several readings fit.

    Raises:
        DataError: The folder has no known layout, several fit, a file cannot be read, or fewer than two samples can be
            used.
        RecipeError: The dataset is declared already, or there is no project.
    """
    if folder.is_file():
        raise DataError(f"{folder} is a file. Name the folder that it is in: {folder.parent}.")
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. Name the folder that holds the images.")
    folder = folder.resolve()
    name = slug(name or folder.name)
    package = root_module(project)
    path = project / package.replace(".", "/") / "defs" / "datasets" / name / "defs.yaml"
    if path.exists():
        raise RecipeError(f"{path} exists already. Edit it, or give another name with --name.")
    inventory = take_inventory(folder)
    reading = read_layout(Folder(found=inventory, root=root.resolve(), options=options or Options()))
    attributes = as_attributes(name, reading)
    spec = as_spec(attributes)
    count = count_rows(spec, root, inventory, reading)
    every = math.ceil(count.num_rows / MAX_CHECKED)
    shown: list[ShownRow | None] = []
    again = followed(read_source(spec.source, root), "decode a sample of rows", count.num_rows)
    rows = show_first(islice(again, 0, None, max(1, every)), spec, shown)
    found = preview(spec, rows, VAL_SHARE)
    _refuse_unusable(folder, found)
    if not spec.source.is_split:
        attributes["split"] = _split_sizes(found, count.num_rows)
        spec = as_spec(attributes)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({"type": COMPONENT, "attributes": attributes}, sort_keys=False, allow_unicode=True, width=110)
    write_text_atomic(path, text)
    return Scaffold(
        name=name,
        path=path,
        num_samples=count.num_rows,
        preview=found,
        entries=(spec.train_entry, spec.val_entry),
        brings_split=spec.source.is_split,
        has_test=_gives_test(spec.source) if spec.source.is_split else found.num_test > 0,
        layout=reading.layout,
        columns=reading.columns,
        shown=tuple(row for number in found.first_usable if number < len(shown) and (row := shown[number])),
        files=count.files(),
        warnings=count.warnings(),
    )


def _gives_test(source: SourceSpec) -> bool:
    return source.test_split is not None or source.split_column is not None


def as_attributes(name: str, reading: Reading) -> dict[str, Any]:
    """The attributes of the YAML for a reading."""
    attributes: dict[str, Any] = {"name": name, "source": dict(reading.source)}
    if reading.prompts:
        attributes["prompts"] = list(reading.prompts)
    if reading.answer:
        attributes["answer"] = reading.answer
    return attributes


def _refuse_unusable(folder: Path, found: Preview) -> None:
    if found.num_train and found.num_val:
        return
    if found.num_usable > 1:
        raise DataError(
            f"{folder}: its {found.num_usable} usable samples all look alike, so validation samples would be "
            "duplicates of training samples. Add other pictures."
        )
    reasons = "".join(
        f"\n  {count} {reason}, the first: {found.first_rejected[reason]}"
        for reason, count in found.reject_reasons.items()
    )
    advice = "Fix the files, or add others."
    if "image_outside_root" in found.reject_reasons:
        advice = "Fix the files, or name the folder that the paths lead to with --media-dir DIR."
    raise DataError(
        f"{folder}: {found.num_usable} of {found.num_checked} samples can be used, but a dataset needs at least 2. "
        f"{advice}{reasons}"
    )


def _split_sizes(found: Preview, num_samples: int) -> dict[str, int]:
    """What the samples allow; extrapolated with a margin if only some were checked."""
    sizes = {"num_train": found.num_train, "num_val": found.num_val, "num_test": found.num_test}
    times = 1 if found.num_checked == num_samples else SAFE_SHARE * num_samples / found.num_checked
    # without test samples now there is no number for them either: more samples may give some
    return {name: int(times * size) for name, size in sizes.items() if size}


def as_spec(attributes: Mapping[str, Any]) -> DatasetSpec:
    """Check the YAML before it is written."""
    values = dict(attributes)
    values["source"] = SourceSpec(**values["source"])
    values["split"] = SplitSpec(**values.get("split", {}))
    return DatasetSpec(**values)


def _not_opened(format: str) -> str:
    return f"it is {format}" + (" (`pip install pillow-heif` lets it be read)" if format == "HEIF" else "")


class _Samples:
    """The samples without their images, and which images they use."""

    def __init__(self) -> None:
        self.values: list[dict[str, Any]] = []
        self._seen: Counter[str] = Counter()
        self._numbers: dict[str, int] = {}
        self._uses: list[int] = []
        self._offsets = [0]
        self.unsupported: dict[str, str] = {}  # the formats of images that are not opened

    def collect(self, rows: Iterable[SourceRow]) -> Iterator[bytes]:
        """Yield each distinct image once, in order of first use."""
        for row in rows:
            values = raw_row(row, self._seen)
            for image_id, data in zip(values["image_ids"], values.pop("images"), strict=True):
                is_new = image_id not in self._numbers
                self._uses.append(self._numbers.setdefault(image_id, len(self._numbers)))
                if is_new:
                    if not looks_like_picture(data[:32]) or data[4:8] == b"ftyp":
                        self.unsupported |= (
                            {image_id: _not_opened(found)} if (found := unsupported_format(data)) else {}
                        )
                    yield data
            self._offsets.append(len(self._uses))
            self.values.append(values)

    def index(self) -> ImageIndex:
        return ImageIndex(
            ids=pa.array(list(self._numbers), pa.string()),
            uses_T=np.array(self._uses, np.int32),
            offsets_S1=np.array(self._offsets, np.int64),
            group_samples=[0, len(self.values)],
            group_images=[0, len(self._numbers)],
            text_only={n: values["sample_id"][:16] for n, values in enumerate(self.values) if not values["image_ids"]},
        )
