"""Augmentation: the same bytes each time, of training samples only, each a row that says what it came from."""

import io
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from mllm_assets.data.curate.augment import augmented
from mllm_assets.data.curate.checks import counts_add_up, splits_share_no_image
from mllm_assets.data.ingest.spec import OutputSpec
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.row_files import read_rows
from mllm_assets.errors import RecipeError
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import encode, made_spec, picture, png, run_line, write_source

pytestmark = pytest.mark.not_fast

OPERATIONS = ("flip", "crop", "color", "crop")


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_what_the_operations_do() -> None:
    data = png(1)
    assert opened(augmented(data, "flip", "s")).tobytes() == ImageOps.mirror(picture(1)).tobytes()
    crop = opened(augmented(data, "crop", "s"))
    assert all(0.8 * 64 - 1 <= edge <= 64 for edge in crop.size)
    color = opened(augmented(data, "color", "s"))
    assert color.size == (64, 64) and color.tobytes() != picture(1).tobytes()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_kind_of_image_can_be_changed(mode: str) -> None:
    data = encode(picture(1, mode=mode), "TIFF" if mode == "CMYK" else "PNG")
    assert {opened(augmented(data, operation, "s")).mode for operation in OPERATIONS} == {"RGB"}


def test_each_training_sample_has_its_copies_with_lineage_and_validation_has_none(layout: Layout) -> None:
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
    *_, version = run_line(made_spec(8, 4, augment=OPERATIONS), layout)
    rows = list(read_rows(version.directory / "train.json"))
    originals, copies = rows[:8], rows[8:]
    assert version.augmentations == {"color": 8, "crop": 8, "crop_2": 8, "flip": 8}
    assert (version.num_train, version.num_augmented, len(copies)) == (8, 32, 32)
    assert counts_add_up(version).passed
    by_id = {row["id"]: row for row in originals}
    assert not any("source_id" in row for row in originals)
    for row in copies:
        source = by_id[row["source_id"]]
        assert row["id"] == f"{row['source_id']}+{row['augmentation']}"
        assert row["messages"] == source["messages"] and row["images"] != source["images"]
    assert len({tuple(row["images"]) for row in rows}) == 40, "two crops of a picture are two pictures"
    assert not any("source_id" in row for row in read_rows(version.directory / "val.json"))
    assert len(Dataset(layout.data).entry("made_train").rows) == 40
    stored = QualityStore(layout.quality_db).query(
        "SELECT reason, count(*) AS n FROM split_membership WHERE split = 'augmented' GROUP BY reason ORDER BY reason"
    )
    assert {row["reason"]: row["n"] for row in stored} == version.augmentations


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    digests = []
    for place, seed in (("a", 1), ("b", 1), ("c", 2)):
        layout = Layout(tmp_path / place)
        write_source(layout.root, [(png(n), f"picture {n}") for n in range(8)])
        *_, version = run_line(made_spec(6, 2, seed=seed, augment=("crop", "color")), layout)
        files = {path.name: path.read_bytes() for path in layout.images.iterdir()}
        digests.append((version.digest, files))
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[2][0]


def test_a_copy_that_looks_like_a_validation_image_is_left_out(layout: Layout) -> None:
    """The mirror image of a training picture can be a validation picture, which near-duplicates do not show."""
    rows: list[tuple[bytes | None, str | None]] = [(png(n), f"picture {n}") for n in range(12)]
    rows += [(encode(ImageOps.mirror(picture(n))), f"other {n}") for n in range(12)]
    write_source(layout.root, rows)
    *_, version = run_line(made_spec(16, 8, augment=("flip",)), layout)
    assert version.augmentations["augmentation_matches_val"] > 0
    assert version.num_augmented == 16 - version.augmentations["augmentation_matches_val"]
    assert splits_share_no_image(version.directory, layout.data).passed


def test_copies_of_a_sample_of_several_images_change_all_of_them(layout: Layout) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [[png(2 * n), png(2 * n + 1)] for n in range(6)]
    pq.write_table(pa.table({"image": images, "text": [f"pair {n}" for n in range(6)]}), layout.root / "source.parquet")
    spec = made_spec(4, 2, augment=("flip",), output=OutputSpec(image_prefix="pairs"))
    *_, version = run_line(spec, layout)
    copies = list(read_rows(version.directory / "train.json"))[4:]
    assert [row["images"] for row in copies] == [
        [f"images/pairs_train_{n:06d}_flip.png", f"images/pairs_train_{n:06d}_1_flip.png"] for n in range(4)
    ]


def test_an_unknown_operation_is_named() -> None:
    with pytest.raises(RecipeError, match="augment holds 'rotate'. Use flip, crop, color"):
        made_spec(augment=("rotate",))
