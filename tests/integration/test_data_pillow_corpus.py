"""All images of Pillow's own test suite in one dataset: truncated, bombs, CMYK, 16 bits, animations, no images at all.

They are not in this repository; pip fetches Pillow's source distribution from the configured index.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from mllm_assets.data.quality.store import QualityStore
from tests.integration.conftest import Project, make_project

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]

REASONS = {
    "image_empty",
    "image_format_unsupported",
    "image_unreadable",
    "image_truncated",
    "image_corrupt",
    "image_too_small",
    "image_too_many_bytes",
    "image_too_many_pixels",
    "image_too_many_frames",
}
LIMITS = {"max_pixels": 30_000_000, "max_image_bytes": 5_000_000, "max_frames": 40, "max_decode_s": 20}
# what each must become, by file; None is a usable picture
EXPECTED = {
    "hopper.jpg": None,
    "hopper.png": None,
    "hopper.webp": None,
    "hopper.gif": None,
    "hopper.bmp": None,
    "hopper.tif": None,
    "pil_sample_cmyk.jpg": None,
    "16_bit_noise.tif": None,
    "p_trns_single.png": None,
    "hopper_orientation_6.jpg": None,
    "rgb_trns.png": None,
    "truncated_image.png": "image_truncated",
    "truncated_jpeg.jpg": "image_truncated",
    "broken_data_stream.png": "image_corrupt",
    "broken.png": "image_unreadable",
    "zero_bytes.png": "image_empty",
    "fujifilm.mpo": "image_too_many_bytes",
    "decompression_bomb.gif": "image_too_many_pixels",
    "bmp/b/reallybig.bmp": "image_too_many_pixels",
    "png_decompression_dos.png": "image_unreadable",
    "iss634.gif": "image_too_many_frames",
    "iss634.webp": "image_too_many_frames",
    "libtiff_segfault.tif": "image_unreadable",
    "sgi_crash.bin": "image_format_unsupported",
    "eps/1.eps": "image_format_unsupported",  # would start ghostscript
}


def fetch_pillow_images() -> Path:
    """The folder Tests/images of the installed Pillow's source distribution, kept in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mllm_assets_tests"
    name = f"pillow-{PIL.__version__}"
    archive, folder = cache / f"{name}.tar.gz", cache / name / "Tests" / "images"
    if not archive.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        # only Pillow from source: what its build needs may be wheels
        pip += ["--no-binary", "pillow", "--dest", str(cache), f"pillow=={PIL.__version__}"]
        found = subprocess.run(pip, capture_output=True, text=True)
        if found.returncode != 0:
            last = (found.stderr.strip().splitlines() or ["no message"])[-1]
            pytest.skip(f"pip cannot fetch Pillow's source distribution from its index: {last}")
    if not folder.is_dir():
        with tarfile.open(archive) as tar:
            members = [member for member in tar if member.name.startswith(f"{name}/Tests/images/")]
            tar.extractall(cache, members=members, filter="data")
    return folder


def corpus() -> Iterator[tuple[str, bytes]]:
    folder = fetch_pillow_images()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.read_bytes()
    yield "zero_bytes.png", b""


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return dict(corpus())


@pytest.fixture(scope="module")
def project(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose only data are these files, materialised by Dagster."""
    project = make_project(tmp_path_factory.mktemp("pillow"))
    table = pa.table({"image": list(files.values()), "text": [f"the file {name}" for name in files]})
    pq.write_table(table, project.root / "pillow.parquet", row_group_size=64)
    folder = project.root / project.package / "defs" / "datasets" / "pillow"
    folder.mkdir()
    attributes = {
        "name": "pillow",
        "source": {"kind": "parquet", "path": "pillow.parquet"},
        "prompts": ["Which file is this?"],
        "split": {"num_train": 1500, "num_val": 100},
        "quality": LIMITS,
    }
    component = {"type": "mllm_assets.components.ImageTextDataset", "attributes": attributes}
    (folder / "defs.yaml").write_text(yaml.safe_dump(component))
    project.made('+key:"pillow/dataset_info"')
    return project


@pytest.mark.attack("pictures")
def test_each_file_is_a_usable_picture_or_a_row_with_a_reason(
    project: Project, files: dict[str, bytes], record_property: Callable[[str, object], None]
) -> None:
    assert len(files) > 1000
    record_property("tries", len(files))
    counts = project.metadata("pillow", "train")
    parts = ("train", "val", "test", "unused", "rejected")
    assert counts["num_raw"] == len(files) == sum(counts[f"num_{part}"] for part in parts)
    store = QualityStore(project.layout.quality_db)
    fates = store.query(
        "SELECT caption, split, reason FROM split_membership JOIN samples USING (dataset, sample_id) "
        "WHERE dataset = 'pillow'"
    )
    assert len(fates) == len(files)
    reasons = {row["caption"].removeprefix("the file "): row["reason"] for row in fates if row["split"] == "rejected"}
    assert set(reasons.values()) <= REASONS
    unused = Counter(row["reason"] for row in fates if row["split"] == "unused")
    assert set(unused) <= {"sample_duplicate", "over_quota"}

    used = set()
    for path in (project.layout.data / "pillow").glob("[tv]*.json"):
        for row in json.loads(path.read_text()):
            used.add(row["messages"][-1]["content"].removeprefix("the file "))
            with Image.open(project.layout.data / row["images"][0]) as image:
                assert image.convert("RGB").getextrema() and image.mode in ("RGB", "L"), row
                assert "transparency" not in image.info and getattr(image, "n_frames", 1) == 1
    assert not used & set(reasons)
    assert len(used) > 400


def test_files_of_each_kind_become_what_they_should(project: Project, files: dict[str, bytes]) -> None:
    rejects = QualityStore(project.layout.quality_db).query(
        "SELECT caption, reject_reason FROM verdicts JOIN samples USING (dataset, sample_id) WHERE dataset = 'pillow'"
    )
    found = {row["caption"].removeprefix("the file "): row["reject_reason"] for row in rejects}
    assert {name: found[name] for name in EXPECTED} == EXPECTED


def test_no_pixel_of_a_used_picture_needs_pillow_to_be_lenient(project: Project) -> None:
    """A decoder that fills up a short file would show the model a picture that is half grey."""
    for path in sorted(project.layout.images.iterdir()):
        Image.open(io.BytesIO(path.read_bytes())).load()
