"""The published version: ShareGPT rows, content-addressed images, counts that add up, the same bytes again."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mllm_assets.artifacts import find_damage
from mllm_assets.data.curate.splits import no_test_text, split
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import encode, made_spec, picture, png, run_line, write_source

pytestmark = pytest.mark.not_fast


def rows_of(version: Path) -> list[dict[str, Any]]:
    return [row for name in ("train.json", "val.json") for row in json.loads((version / name).read_text())]


def sides_of(version: Path) -> dict[str, str]:
    return {row["id"]: side for side in ("train", "val") for row in json.loads((version / f"{side}.json").read_text())}


def test_every_sample_is_somewhere_with_a_reason(layout: Layout) -> None:
    rows: list[tuple[bytes | None, str | None]] = [(png(n), f"picture {n}") for n in range(20)]
    rows += [(png(0), "picture 0"), (png(30), ""), (b"no image", "x"), (None, "y"), (png(31)[:200], "z")]
    write_source(layout.root, rows)
    _, quality, version = run_line(made_spec(10, 2), layout)
    assert version.num_raw == 25
    assert (version.num_train, version.num_val, version.num_test) == (10, 2, 2)
    assert (version.num_unused, version.num_rejected) == (7, 4)
    assert version.unused_reasons == {"over_quota": 6, "sample_duplicate": 1}
    assert version.reject_reasons == quality.reject_reasons
    assert quality.reject_reasons == {
        "caption_empty": 1,
        "image_missing": 1,
        "image_truncated": 1,
        "image_unreadable": 1,
    }
    stored = QualityStore(layout.quality_db).query("SELECT split, count(*) AS n FROM split_membership GROUP BY split")
    assert {row["split"]: row["n"] for row in stored} == {"train": 10, "val": 2, "test": 2, "unused": 7, "rejected": 4}


def test_rows_are_sharegpt_with_prompts_in_turn(layout: Layout) -> None:
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
    *_, version = run_line(made_spec(10, 2, system="Be brief."), layout)
    train = json.loads((version.directory / "train.json").read_text())
    users = [row["messages"][1]["content"] for row in train]
    assert users[:3] == ["<image>What is this?", "<image>Describe it.", "<image>What is this?"]
    assert train[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert train[0]["messages"][2]["content"].startswith("picture ")
    assert all((layout.data / name).is_file() for row in train for name in row["images"])
    assert find_damage(version.directory) is None


def test_a_brace_in_a_caption_is_text(layout: Layout) -> None:
    write_source(layout.root, [(png(1), "a {label} {caption} {x}"), (png(2), "b")])
    *_, version = run_line(made_spec(1, 1, answer="It shows {caption}."), layout)
    answers = {row["messages"][-1]["content"] for row in rows_of(version.directory)}
    assert answers == {"It shows a {label} {caption} {x}.", "It shows b."}


def test_plain_images_pass_through_and_others_become_the_upright_picture_on_white(layout: Layout) -> None:
    """LLaMA-Factory neither turns a photo by its EXIF orientation nor flattens alpha."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(picture(1).resize((64, 32)), "JPEG", exif=exif, quality=95)
    clear = encode(Image.new("RGBA", (64, 64), (10, 20, 30, 0)))
    plain = encode(picture(3), "JPEG")
    write_source(layout.root, [(turned, "turned"), (clear, "clear"), (plain, "plain")])
    *_, version = run_line(made_spec(2, 1), layout)
    files = {row["messages"][-1]["content"]: layout.data / row["images"][0] for row in rows_of(version.directory)}
    assert files["plain"].read_bytes() == plain
    assert files["plain"].suffix == ".jpg"
    assert Image.open(files["turned"]).size == (32, 64)
    assert Image.open(files["clear"]).getpixel((0, 0)) == (255, 255, 255)


def test_the_same_input_gives_the_same_bytes_in_another_place(tmp_path: Path) -> None:
    versions = []
    for name in ("a", "b"):
        layout = Layout(tmp_path / name)
        write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
        *_, version = run_line(made_spec(), layout, run_id=f"run of {name}")
        versions.append((version.digest, (version.directory / "train.json").read_bytes()))
    assert versions[0] == versions[1]


def test_again_changes_nothing_and_repairs_a_lost_image(layout: Layout) -> None:
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
    spec = made_spec()
    raw, quality, version = run_line(spec, layout)
    lost, broken = sorted(layout.images.iterdir())[:2]
    lost.unlink()
    broken.write_bytes(b"damaged")
    again = split(spec, layout, raw.directory, quality.directory, "run-2")
    assert again == version
    assert Image.open(lost).size == Image.open(broken).size == (64, 64)


def test_added_samples_move_no_old_sample_across(layout: Layout) -> None:
    spec = made_spec(80, 20)
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(40)])
    *_, first = run_line(spec, layout)
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(70)])
    *_, second = run_line(spec, layout, "run-2")
    old, new = sides_of(first.directory), sides_of(second.directory)
    assert len(new) == 70
    assert [key for key in old if new.get(key) != old[key]] == []


def test_near_duplicates_are_on_one_side(layout: Layout) -> None:
    """A copy in another size or compression in validation would be remembered, not recognised."""
    rows: list[tuple[bytes | None, str | None]] = [(png(n, 96), f"picture {n}") for n in range(30)]
    rows += [(encode(picture(n, 96).resize((64, 64)), "JPEG", quality=80), f"copy {n}") for n in range(30)]
    write_source(layout.root, rows)
    _, quality, version = run_line(made_spec(40, 20), layout)
    answers = [
        {row["messages"][-1]["content"].split()[1] for row in json.loads((version.directory / name).read_text())}
        for name in ("train.json", "val.json")
    ]
    assert quality.num_duplicates == 30
    assert not answers[0] & answers[1]
    assert (version.num_train, version.num_val) == (40, 20)


def test_the_link_points_to_the_newest_version(layout: Layout) -> None:
    for count in (12, 14):
        write_source(layout.root, [(png(n), f"picture {n}") for n in range(count)])
        *_, version = run_line(made_spec(11, 3), layout)
        assert (layout.data / "made").resolve() == version.directory
        assert not os.path.isabs(os.readlink(layout.data / "made"))


def test_a_wide_gray_or_sixteen_bit_image_becomes_eight_bits(layout: Layout) -> None:
    buffer = io.BytesIO()
    Image.new("I;16", (64, 64), 30000).save(buffer, "PNG")
    write_source(layout.root, [(buffer.getvalue(), "deep"), (png(1), "plain")])
    *_, version = run_line(made_spec(1, 1), layout)
    files = {row["messages"][-1]["content"]: layout.data / row["images"][0] for row in rows_of(version.directory)}
    assert Image.open(files["deep"]).mode == "RGB"


@pytest.mark.parametrize(
    ("source", "num_test", "step"),
    [
        ({}, None, "put `num_test: 2` below `split:`"),
        ({}, 0, "put `num_test: 2` below `split:`"),
        ({"val_split": "validation"}, None, "name its part for it as `test_split:` below `source:`"),
        ({"split_column": "part"}, None, "write test into the column part"),
    ],
)
def test_a_dataset_without_a_test_split_says_how_to_get_one(
    source: dict[str, str], num_test: int | None, step: str
) -> None:
    """Three ways at once, of which one or two did nothing for the dataset at hand."""
    spec = made_spec(10, 2)
    spec = replace(spec, source=replace(spec.source, **source), split=replace(spec.split, num_test=num_test))
    assert step in no_test_text(spec, num_unused=0)


def test_the_number_that_is_advised_gives_a_test_split(layout: Layout) -> None:
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
    spec = made_spec(10, 2)
    *_, version = run_line(spec, layout)
    assert version.num_test == 0
    *_, version = run_line(replace(spec, split=replace(spec.split, num_test=2)), layout)
    assert version.num_test > 0
