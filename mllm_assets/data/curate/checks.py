"""Checks of a published version, computed from the files on disk and not from what the code meant to write."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mllm_assets.artifacts import read_manifest
from mllm_assets.data.curate.publish import side_files
from mllm_assets.data.curate.splits import SplitResult
from mllm_assets.data.ingest.images import departure, departure_text
from mllm_assets.data.ingest.spec import DEFAULT_LIMITS
from mllm_assets.data.ingest.split_spec import SIDES, TEST, TRAIN, VAL
from mllm_assets.data.quality.grouping import pairs_across
from mllm_assets.data.quality.measure import FileLooks, look_at_files, measure_files
from mllm_assets.data.quality.probes import ImageMeasurement
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.sharegpt.conversation import IMAGE_PLACEHOLDER, text_defect
from mllm_assets.data.sharegpt.entries import EntryInfo, load_entries
from mllm_assets.data.sharegpt.parsing import parse_rows
from mllm_assets.data.sharegpt.row_files import read_rows
from mllm_assets.data.sharegpt.rows import ASKING, ASSISTANT, Row, entry_problems
from mllm_assets.errors import MllmAssetsError
from mllm_assets.file_digests import FileDigests
from mllm_assets.progress import doing, followed

MAX_EXAMPLES = 5
CHECKED_FILES = 1024  # images whose measurements are in memory together
MAX_PAIRS = 500  # about 40 KB of metadata; `mllm-assets quality leaks` shows all
_LEAK_CURE = (
    "The split is as it was given, so they stay; figures on them say too much. A release needs `allow_leakage: true` "
    "in the recipe's settings; all pairs: mllm-assets quality leaks."
)
_ADVICE = {
    "control_token": "holds a control token of the model. Remove it from the text.",
    "control_character": "holds a control character. Remove it from the text.",
    "undecodable": "holds a character that could not be read. Write the text again from its source.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckOutcome:
    """Whether a check passed, in words, with JSON-able numbers."""

    passed: bool
    description: str
    metadata: dict[str, Any] = field(default_factory=dict)


@doing("check rows and their images")
def every_image_has_a_placeholder(version_dir: Path, data_dir: Path) -> CheckOutcome:
    """Each row has as many `<image>` as images, none where it is of text only, and every image file exists.

    Raises:
        IntegrityError: The version was never finished.
        DataError: A split file is not JSON.
    """
    problems: list[str] = []
    num_rows = 0
    for path in _side_files(version_dir).values():
        for index, row in enumerate(read_rows(path)):
            num_rows += 1
            place = f"{path.name} row {index} ({row.get('id', 'no id')})"
            images = row.get("images", [])
            num_placeholders = sum(
                m["content"].count(IMAGE_PLACEHOLDER) for m in row["messages"] if m["role"] != "system"
            )
            if num_placeholders != len(images):
                problems.append(f"{place}: {num_placeholders} placeholders, {len(images)} images")
            problems += [f"{place}: no file {name}" for name in images if not (data_dir / name).is_file()]
    return CheckOutcome(
        passed=not problems,
        description=_describe(
            problems,
            f"All {num_rows} rows have one {IMAGE_PLACEHOLDER} for each image.",
            "Materialise the splits again.",
        ),
        metadata={"num_rows": num_rows, "num_problems": len(problems), "examples": problems[:MAX_EXAMPLES]},
    )


@doing("compare the splits' images")
def splits_share_no_image(
    version_dir: Path,
    data_dir: Path,
    store: QualityStore | None = None,
    digests: FileDigests | None = None,
) -> CheckOutcome:
    """No image of a side, nor a near-duplicate, is on another; every image is read, and measured by its bytes.

    Near-duplicates are those of the limits that the version was split with. For the rest see `measure_files`.
    """
    spec = read_manifest(version_dir)["spec"]
    limits = spec["quality"]
    is_given = (
        spec["split"]["strategy"] == "guide" or spec["source"].get("val_split") or spec["source"].get("split_column")
    )
    files = _side_files(version_dir)
    used = {side: {name for row in read_rows(path) for name in row["images"]} for side, path in files.items()}
    names = sorted(set().union(*used.values()))
    hashes = look_at_files(data_dir, names, store, digests)
    problems = [f"{names[number]}: {image.defect}" for number, image in hashes.defective.items()]
    here = {
        side: hashes.whole_N & np.fromiter((name in used.get(side, ()) for name in names), bool, len(names))
        for side in SIDES
    }
    for one, other in ((here[TRAIN], here[VAL] | here[TEST]), (here[VAL], here[TEST])):
        compared = np.flatnonzero(one | other)
        across = pairs_across(
            hashes.phash_N[compared],
            hashes.colors_NC[compared],
            one[compared],
            other[compared],
            distance_bits=limits["duplicate_distance_bits"],
            color_distance=limits["duplicate_color_distance"],
        )
        problems += [_pair(hashes, names, compared[a], compared[b], distance) for a, b, distance in across]
    numbers = {f"num_{side}_images": len(side_names) for side, side_names in used.items()}
    return CheckOutcome(
        passed=not problems,
        description=_describe(
            problems,
            f"No image of {', '.join(f'{side} ({len(its)})' for side, its in used.items())} is like one of another.",
            _LEAK_CURE if is_given else "Materialise sample_quality and the splits again.",
        ),
        metadata={**numbers, "num_problems": len(problems), "pairs": problems[:MAX_PAIRS]},
    )


def counts_add_up(version: SplitResult | Mapping[str, Any]) -> CheckOutcome:
    """Raw = all sides + unused + rejected, and the reasons add up too; `version` may be a version's manifest."""
    counts = asdict(version) if isinstance(version, SplitResult) else {"num_test": 0, **version}
    names = (*SIDES, "unused", "rejected")
    parts = [counts[f"num_{name}"] for name in names]
    reasons = sum(counts["unused_reasons"].values()), sum(counts["reject_reasons"].values())
    passed = counts["num_raw"] == sum(parts) and reasons == (counts["num_unused"], counts["num_rejected"])
    sign = "=" if counts["num_raw"] == sum(parts) else "is not"
    shown = " + ".join(f"{part} {name}" for part, name in zip(parts, names, strict=True))
    text = f"{counts['num_raw']} raw {sign} {shown}"
    if not passed:
        text += f"; reasons are given for {reasons[0]} unused and {reasons[1]} rejected samples. Report this as a bug"
    keys = ("num_raw", *(f"num_{name}" for name in names), "unused_reasons", "reject_reasons")
    return CheckOutcome(passed=passed, description=f"{text}.", metadata={key: counts[key] for key in keys})


def _side_files(version_dir: Path) -> dict[str, Path]:
    return side_files(version_dir, read_manifest(version_dir)["spec"]["output"]["format"])


def _pair(hashes: FileLooks, names: list[str], a: int, b: int, distance_bits: int) -> str:
    if distance_bits == 0 and np.array_equal(hashes.colors_NC[a], hashes.colors_NC[b]):
        return f"{names[a]} = {names[b]}"
    return f"{names[a]} ~ {names[b]} ({distance_bits} bits apart)"


def _describe(problems: list[str], fine: str, cure: str) -> str:
    if not problems:
        return fine
    return f"{len(problems)} problems, the first: {problems[0]}. {cure}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryReport:
    """What was found in an entry; it can be trained on if it has no problems, even with warnings."""

    name: str
    num_rows: int
    num_images: int
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def check_directory(data_dir: Path, media_dir: Path | None = None) -> Iterator[EntryReport]:
    """Each entry of `dataset_info.json`: its rows as training reads them, and every image decoded.

    `media_dir` is the folder that a recipe names so.

    Raises:
        DataError: `dataset_info.json` is missing or not JSON.
    """
    return (_check_entry(data_dir, entry, media_dir) for entry in load_entries(data_dir).values())


@doing("check rows and their images")
def _check_entry(data_dir: Path, entry: EntryInfo, media_dir: Path | None) -> EntryReport:
    problems = entry_problems(entry, with_pairs=True)
    warnings: list[str] = []
    users: dict[str, str] = {}  # the first row of each image
    num_rows = 0
    if not problems:
        try:
            for row, found in followed(parse_rows(data_dir, entry, media_dir), f"{entry.name}: check rows"):
                num_rows += 1
                problems += found
                if row is not None and not found:
                    _check_texts(row, entry, problems, warnings)
                    for image in row.images:
                        users.setdefault(str(image), row.id)
            if not num_rows:
                problems.append(f"Entry {entry.name!r} has no rows. Add samples, or remove the entry.")
        except MllmAssetsError as error:
            problems.append(str(error))
    departures: Counter[str] = Counter()
    for path, image in followed(_measured(list(users)), f"{entry.name}: check images", len(users)):
        if image.defect is not None:
            found = f"{image.defect} ({image.format})" if image.format and not image.mode else image.defect
            problems.append(
                f"{path} ({users[path]}): {found}. Training would end there: replace it, or take the row out."
            )
        elif why := departure(image.mode or "", image.orientation or 1):
            departures[why] += 1
    warnings += [departure_text(why, num_pictures) for why, num_pictures in departures.items()]
    return EntryReport(
        name=entry.name,
        num_rows=num_rows,
        num_images=len(users),
        problems=tuple(problems),
        warnings=tuple(warnings),
    )


def _measured(paths: Sequence[str]) -> Iterator[tuple[str, ImageMeasurement]]:
    """Each path and what is there; a part of them is in memory at a time."""
    for first in range(0, len(paths), CHECKED_FILES):
        part = paths[first : first + CHECKED_FILES]
        yield from zip(part, measure_files([Path(path) for path in part], DEFAULT_LIMITS, None), strict=True)


def _check_texts(row: Row, entry: EntryInfo, problems: list[str], warnings: list[str]) -> None:
    for number, message in enumerate(row.messages):
        text = message.content.replace(IMAGE_PLACEHOLDER, "") if message.role in ASKING else message.content
        if defect := text_defect(text):
            problems.append(f"Entry {entry.name!r}, {row.id}, message {number}: {_ADVICE[defect]}")
        if message.role == ASSISTANT and not message.content.strip():
            warnings.append(
                f"{entry.file_name} ({row.id}), message {number}: the answer is empty, and teaches the model to end "
                f"its turn at once. Write it, or take the row out."
            )
