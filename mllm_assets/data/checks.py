"""What must hold of a published version, computed from the files on disk and not from what the code meant to write."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import read_manifest
from mllm_assets.data.row_files import read_rows
from mllm_assets.data.splits import SIDES, SplitResult, split_file
from mllm_assets.data.tokens import IMAGE_PLACEHOLDER
from mllm_assets.quality.duplicates import look_of, pairs_across
from mllm_assets.quality.measure import measure_files
from mllm_assets.quality.probes import OWN_FILES, ImageMeasurement
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
    for side, rows in _rows_by_side(version_dir).items():
        for index, row in enumerate(rows):
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
    names = {
        side: {name for row in rows for name in row["images"]} for side, rows in _rows_by_side(version_dir).items()
    }
    every_name = sorted(set().union(*names.values()))
    files = measure_files([data_dir / name for name in every_name], OWN_FILES, store)
    measured = dict(zip(every_name, files, strict=True))
    problems = [f"{name}: {image.defect}" for name, image in measured.items() if image.defect is not None]
    whole = {name: image for name, image in measured.items() if image.defect is None}
    trained, held = (_by_look(names[side], whole) for side in SIDES)
    problems += [f"{trained[look][0]} = {name}" for look in held if look in trained for name in held[look]]
    across = pairs_across(
        {look_of(image): (image.phash_64 or 0, image.color_48 or "") for image in whole.values()},
        trained,
        held,
        distance_bits=limits["duplicate_distance_bits"] if duplicate_distance is None else duplicate_distance,
        color_distance=limits["duplicate_color_distance"] if color_distance is None else color_distance,
    )
    problems += [f"{trained[a][0]} ~ {name} ({bits} bits apart)" for a, b, bits in across for name in held[b]]
    numbers = {f"num_{side}_images": len(side_names) for side, side_names in names.items()}
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


def _rows_by_side(version_dir: Path) -> dict[str, list[dict[str, Any]]]:
    return {side: read_rows(version_dir / split_file(side, _format(version_dir))) for side in SIDES}


def _by_look(names: Collection[str], whole: Mapping[str, ImageMeasurement]) -> dict[str, list[str]]:
    """The files of each look, by name."""
    found: dict[str, list[str]] = {}
    for name in sorted(set(names) & whole.keys()):
        found.setdefault(look_of(whole[name]), []).append(name)
    return found


def _is_given(version_dir: Path) -> bool:
    spec = read_manifest(version_dir)["spec"]
    return spec["split"]["strategy"] == "guide" or spec["source"]["val_split"] is not None


def _format(version_dir: Path) -> str:
    return read_manifest(version_dir)["spec"]["output"]["format"]


def _describe(problems: list[str], fine: str, cure: str) -> str:
    if not problems:
        return fine
    return f"{len(problems)} problems, the first: {problems[0]}. {cure}"
