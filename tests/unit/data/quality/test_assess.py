"""Assessing: one decode an image, bad images are rows, thresholds cost no decoding."""

import pyarrow.parquet as pq
import pytest

from mllm_assets.artifacts import find_damage
from mllm_assets.data.curate.splits import split
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.data.ingest.spec import QualitySpec, SourceSpec
from mllm_assets.data.quality.assess import assess
from mllm_assets.data.quality.groups import QUALITY_FILE
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.errors import DataError, IntegrityError
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import encode, made_spec, picture, png, run_line, write_source

pytestmark = pytest.mark.not_fast


def test_a_bad_image_is_a_row_with_a_reason_and_stops_nothing(layout: Layout) -> None:
    write_source(
        layout.root, [(png(1), "one"), (b"\xff\xd8\xff garbage", "two"), (png(3)[:300], "three"), (png(4), "")]
    )
    raw = ingest(made_spec(), layout)
    quality = assess(made_spec(), layout, raw.directory, "run-1")
    rows = pq.read_table(quality.directory / QUALITY_FILE).to_pylist()
    reasons = [row["reject_reason"] for row in rows]
    assert reasons[0] is None
    assert reasons[1] in ("image_unreadable", "image_corrupt")
    assert reasons[2:] == ["image_truncated", "caption_empty"]
    rejects = QualityStore(layout.quality_db).query("SELECT reason, run_id FROM rejects ORDER BY row_index")
    assert [row["reason"] for row in rejects] == reasons[1:]
    assert {row["run_id"] for row in rejects} == {"run-1"}
    assert find_damage(quality.directory) is None


def test_each_picture_is_decoded_once_and_never_again_for_other_thresholds(layout: Layout) -> None:
    write_source(layout.root, [(png(n % 5), f"picture {n}") for n in range(20)])
    raw = ingest(made_spec(), layout)
    first = assess(made_spec(), layout, raw.directory, "run-1")
    strict = made_spec(quality=QualitySpec(min_edge_px=65))
    second = assess(strict, layout, raw.directory, "run-2")
    assert (first.num_decoded, second.num_decoded) == (5, 0)
    assert (first.num_rejected, second.num_rejected) == (0, 20)


def test_a_raised_limit_measures_what_the_old_one_cut_short(layout: Layout) -> None:
    write_source(layout.root, [(png(1), "one"), (png(2), "two")])
    low = made_spec(quality=QualitySpec(max_pixels=1000))
    raw = ingest(low, layout)
    assert assess(low, layout, raw.directory, "run-1").reject_reasons == {"image_too_many_pixels": 2}
    assert assess(made_spec(), layout, raw.directory, "run-2").reject_reasons == {}


def test_the_digest_covers_verdicts_and_not_the_run(layout: Layout) -> None:
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(5)])
    raw = ingest(made_spec(), layout)
    digests = [assess(made_spec(), layout, raw.directory, run).digest for run in ("run-1", "run-2")]
    other = made_spec(quality=QualitySpec(min_edge_px=100))
    assert digests[0] == digests[1] != assess(other, layout, raw.directory, "run-3").digest


def test_a_source_that_was_renamed_can_be_split_all_the_same(layout: Layout) -> None:
    """No measurement and no verdict differs, only where the samples were found."""
    for name in ("source.parquet", "renamed.parquet"):
        spec = made_spec(source=SourceSpec(kind="parquet", path=name))
        write_source(layout.root, [(png(n), f"picture {n}") for n in range(10)], name)
        raw = ingest(spec, layout)
        quality = assess(spec, layout, raw.directory, "run-1")
        assert split(spec, layout, raw.directory, quality.directory, "run-1").num_train == 8


def test_copies_are_counted_and_written_as_pairs(layout: Layout) -> None:
    write_source(layout.root, [(png(1), "one"), (png(1), "the same picture"), (png(2), "two")])
    _, quality, _ = run_line(made_spec(2, 1), layout)
    assert quality.num_duplicates == 1
    pairs = QualityStore(layout.quality_db).query("SELECT kind, distance_bits FROM duplicates")
    assert pairs == [{"kind": "exact", "distance_bits": 0}]


def test_every_image_bad_leaves_nothing_to_split_and_says_so(layout: Layout) -> None:
    write_source(layout.root, [(b"bad", "one"), (None, "two")])
    with pytest.raises(DataError, match="Only 0 usable samples are left.*reject reasons of sample_quality"):
        run_line(made_spec(), layout)


def test_an_unfinished_source_is_refused(layout: Layout) -> None:
    write_source(layout.root, [(png(1), "one")])
    raw = ingest(made_spec(), layout)
    (raw.directory / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match="was never finished. Materialise the asset that makes it again"):
        assess(made_spec(), layout, raw.directory, "run-1")


def test_a_flag_rejects_only_where_asked(layout: Layout) -> None:
    dark, wide = encode(picture(9).point(lambda value: value // 12)), encode(picture(8).resize((300, 200)))
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(6)] + [(dark, "dark"), (wide, "large")])
    raw = ingest(made_spec(), layout)
    plain = assess(made_spec(), layout, raw.directory, "run-1")
    assert plain.flags == {"image_dark": 1, "image_odd_size": 1}
    assert plain.num_rejected == 0
    for flag in ("image_dark", "image_odd_size"):
        strict = made_spec(quality=QualitySpec(reject_flags=(flag,)))
        assert assess(strict, layout, raw.directory, "run-2").reject_reasons == {flag: 1}
