"""What must hold of a published version, computed from the files on disk and not from what the code meant to write."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mllm_assets.artifacts import read_manifest
from mllm_assets.data.row_files import read_rows
from mllm_assets.data.splits import SIDES, SplitResult, split_file
from mllm_assets.data.tokens import IMAGE_PLACEHOLDER
from mllm_assets.quality.duplicates import pairs_across
from mllm_assets.quality.measure import FileLooks, look_at_files
from mllm_assets.quality.probes import OWN_FILES
from mllm_assets.quality.store import QualityStore

MAX_EXAMPLES = 5
MAX_PAIRS = 500  # about 40 KB of metadata; `mllm-assets quality leaks` has them all
_LEAK_CURE = (
    "The split is as it was given, so they stay; figures on them say too much. A release needs `allow_leakage: true` "
    "in the recipe's settings; all pairs: mllm-assets quality leaks."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckOutcome:
    """Whether a check passed, in words, with JSON-able numbers."""

    passed: bool
    description: str
    metadata: dict[str, Any] = field(default_factory=dict)


def every_image_has_a_placeholder(version_dir: Path, data_dir: Path) -> CheckOutcome:
    """Each row has as many `<image>` as images, at least one, and every image file is there.

    Raises:
        IntegrityError: The version was never finished.
        DataError: A split file is not JSON.
    """
    problems: list[str] = []
    num_rows = 0
    format = _format(version_dir)
    for side in SIDES:
        for index, row in enumerate(_rows(version_dir, side)):
            num_rows += 1
            place = f"{split_file(side, format)} row {index} ({row.get('id', 'no id')})"
            images = row.get("images", [])
            num_placeholders = sum(
                m["content"].count(IMAGE_PLACEHOLDER) for m in row["messages"] if m["role"] != "system"
            )
            if not images or num_placeholders != len(images):
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


def splits_share_no_image(
    version_dir: Path,
    data_dir: Path,
    duplicate_distance: int | None = None,
    color_distance: float | None = None,
    store: QualityStore | None = None,
) -> CheckOutcome:
    """No image of train.json, nor a near-duplicate, is in val.json; every image is read, and measured by its bytes.

    Args:
        version_dir: A finished version.
        data_dir: The folder that image paths are relative to.
        duplicate_distance: Hamming distance of the 64-bit hashes up to which two images count as one picture; by
            default what the version was split with.
        color_distance: Likewise for the mean colour difference.
        store: Knows the measurements of bytes that were decoded before.
    """
    limits = read_manifest(version_dir)["spec"]["quality"]
    used = {side: {name for row in _rows(version_dir, side) for name in row["images"]} for side in SIDES}
    names = sorted(set().union(*used.values()))
    looks = look_at_files(data_dir, names, OWN_FILES, store)
    problems = [f"{names[number]}: {image.defect}" for number, image in looks.defective.items()]
    train, val = (looks.whole_N & np.fromiter((name in used[side] for name in names), bool) for side in SIDES)
    across = pairs_across(
        looks.phash_N,
        looks.colors_NC,
        train,
        val,
        distance_bits=limits["duplicate_distance_bits"] if duplicate_distance is None else duplicate_distance,
        color_distance=limits["duplicate_color_distance"] if color_distance is None else color_distance,
    )
    problems += [_pair(looks, names, *pair) for pair in across]
    numbers = {f"num_{side}_images": len(side_names) for side, side_names in used.items()}
    return CheckOutcome(
        passed=not problems,
        description=_describe(
            problems,
            f"None of {numbers['num_train_images']} training images is like one of {numbers['num_val_images']} "
            "validation images.",
            _LEAK_CURE if _is_given(version_dir) else "Materialise sample_quality and the splits again.",
        ),
        metadata={**numbers, "num_problems": len(problems), "pairs": problems[:MAX_PAIRS]},
    )


def counts_add_up(version: SplitResult | Mapping[str, Any]) -> CheckOutcome:
    """Raw = train + val + unused + rejected, and the reasons add up too.

    Args:
        version: What `split` returned, or the manifest of a version.
    """
    counts = asdict(version) if isinstance(version, SplitResult) else version
    parts = [counts[f"num_{part}"] for part in ("train", "val", "unused", "rejected")]
    reasons = sum(counts["unused_reasons"].values()), sum(counts["reject_reasons"].values())
    passed = counts["num_raw"] == sum(parts) and reasons == (counts["num_unused"], counts["num_rejected"])
    sign = "=" if counts["num_raw"] == sum(parts) else "is not"
    text = f"{counts['num_raw']} raw {sign} {parts[0]} train + {parts[1]} val + {parts[2]} unused + {parts[3]} rejected"
    if not passed:
        text += f"; reasons are given for {reasons[0]} unused and {reasons[1]} rejected samples. Report this as a bug"
    keys = ("num_raw", "num_train", "num_val", "num_unused", "num_rejected", "unused_reasons", "reject_reasons")
    return CheckOutcome(passed=passed, description=f"{text}.", metadata={key: counts[key] for key in keys})


def _rows(version_dir: Path, side: str) -> Iterator[dict[str, Any]]:
    return read_rows(version_dir / split_file(side, _format(version_dir)))


def _pair(looks: FileLooks, names: list[str], a: int, b: int, distance_bits: int) -> str:
    if distance_bits == 0 and np.array_equal(looks.colors_NC[a], looks.colors_NC[b]):
        return f"{names[a]} = {names[b]}"
    return f"{names[a]} ~ {names[b]} ({distance_bits} bits apart)"


def _is_given(version_dir: Path) -> bool:
    spec = read_manifest(version_dir)["spec"]
    return spec["split"]["strategy"] == "guide" or spec["source"]["val_split"] is not None


def _format(version_dir: Path) -> str:
    return read_manifest(version_dir)["spec"]["output"]["format"]


def _describe(problems: list[str], fine: str, cure: str) -> str:
    if not problems:
        return fine
    return f"{len(problems)} problems, the first: {problems[0]}. {cure}"
