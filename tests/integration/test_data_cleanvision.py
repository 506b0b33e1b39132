"""Our flags are cleanvision's: same formulas, same default thresholds, without its one-bad-image-stops-all run."""

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from mllm_assets.data.ingest.spec import DecodeLimits, QualitySpec
from mllm_assets.data.quality.probes import measure_image
from mllm_assets.data.quality.verdicts import image_flags
from mllm_assets.sample_data.rebuild import HERE

LIMITS = DecodeLimits(max_pixels=10**8, max_bytes=10**8, max_frames=1, max_decode_s=10)
pytestmark = pytest.mark.integration

ISSUES = {
    "image_dark": "is_dark_issue",
    "image_light": "is_light_issue",
    "image_low_information": "is_low_information_issue",
    "image_blurry": "is_blurry_issue",
    "image_odd_aspect_ratio": "is_odd_aspect_ratio_issue",
}


def pictures() -> list[Image.Image]:
    rows = pq.read_table(HERE / "emoji.parquet", columns=["image"]).to_pylist()[::8]
    plain = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    changed = [ImageEnhance.Brightness(image).enhance(0.15) for image in plain[:10]]
    changed += [image.filter(ImageFilter.GaussianBlur(20)) for image in plain[10:20]]
    changed += [image.resize((400, 60)) for image in plain[20:25]]
    return plain + changed


def test_the_flags_agree_with_cleanvision(tmp_path: Path) -> None:
    from cleanvision import Imagelab

    ours = []
    for number, image in enumerate(pictures()):
        path = tmp_path / f"{number:03}.png"
        image.save(path)
        measured = measure_image(path.read_bytes(), LIMITS)
        ours.append({flag: flag in image_flags(measured, QualitySpec()) for flag in ISSUES})
    lab = Imagelab(data_path=str(tmp_path))
    names = ("dark", "light", "low_information", "blurry", "odd_aspect_ratio")
    lab.find_issues({name: {} for name in names}, n_jobs=1, verbose=False)
    theirs = lab.issues.sort_index()
    for flag, column in ISSUES.items():
        assert [row[flag] for row in ours] == theirs[column].tolist(), flag
    assert sum(row["image_dark"] for row in ours) >= 5
    assert sum(row["image_odd_aspect_ratio"] for row in ours) == 5
