"""The page on a dataset's quality: self-contained, small enough for metadata, and safe with what captions hold."""

import re
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mllm_assets.artifacts import find_damage
from mllm_assets.data.ingest.raw_files import find_images
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.data.quality.assess import assess
from mllm_assets.data.quality.report import MAX_MARKDOWN_BYTES, Histogram, histograms_png, markdown_cell, write_report
from mllm_assets.data.quality.store import CONFIG
from mllm_assets.errors import IntegrityError
from mllm_assets.layout import Layout
from tests.unit.data.quality.made_images import encode, picture

pytestmark = pytest.mark.not_fast

SPEC = DatasetSpec(name="made", source=SourceSpec(kind="parquet", path="source.parquet"), prompts=("What?",))


def assessed(root: Path, rows: list[tuple[bytes, str]]) -> tuple[Path, Path]:
    table = pa.table({"image": [row[0] for row in rows], "text": [row[1] for row in rows]})
    pq.write_table(table, root / "source.parquet")
    raw = ingest(SPEC, Layout(root))
    return raw.directory, assess(SPEC, Layout(root), raw.directory, "run-1").directory


def test_the_page_shows_the_worst_the_pairs_and_the_rejects_and_loads_nothing(tmp_path: Path) -> None:
    rows = [(encode(picture(seed, 96)), f"picture {seed}") for seed in range(6)]
    rows += [(rows[2][0], "a <b>bold</b> copy | of two"), (encode(picture(8).point(lambda v: v // 12)), "dark one")]
    rows += [(rows[3][0][:200], "cut off"), (encode(picture(4, 96), "JPEG", quality=60), "again again again again")]
    raw, quality = assessed(tmp_path, rows)
    report = write_report(raw, quality)
    html = report.html.read_text(encoding="utf-8")
    assert "dark 0.0" in html and "image_truncated" in html
    assert html.count("the same bytes") == 1 and html.count("near: ") == 1
    assert "a &lt;b&gt;bold&lt;/b&gt; copy | of two" in html and "<b>bold" not in html
    assert "again again again again" in html
    links = re.findall(r'(?:src|href)="([^"]{0,30})', html)
    assert links and all(link.startswith(("data:image/webp;base64,", "data:image/png;base64,")) for link in links)
    assert "![histograms](data:image/png;base64," in report.markdown
    assert "&#60;b&#62;bold" in report.markdown
    assert find_damage(quality) is None


def test_a_report_is_made_once_and_is_small_whatever_the_captions(tmp_path: Path) -> None:
    rows = [(encode(picture(seed % 50, 160)), "\U0001f600 long " * 1000) for seed in range(60)]
    raw, quality = assessed(tmp_path, rows)
    report = write_report(raw, quality)
    assert len(report.markdown.encode()) < MAX_MARKDOWN_BYTES < 200_000
    made_at = report.html.stat().st_mtime_ns
    assert write_report(raw, quality) == report
    assert report.html.stat().st_mtime_ns == made_at


@pytest.mark.slow
def test_ten_thousand_long_texts_are_assessed_and_reported_in_bounded_memory(tmp_path: Path) -> None:
    """60 MB of texts: those of all samples were joined to choose twelve, and 2,048 at once are read."""
    pictures = [encode(picture(seed, 96)) for seed in range(50)]
    raw, quality = assessed(tmp_path, [(pictures[n % 50], f"{n} " + "word " * 1200) for n in range(10_000)])
    with patch.dict(CONFIG, {"memory_limit": "64MB"}):
        report = write_report(raw, quality)
    assert "the same bytes" in report.html.read_text(encoding="utf-8")


def test_a_dataset_without_one_good_image_has_a_report_too(tmp_path: Path) -> None:
    raw, quality = assessed(tmp_path, [(b"no image", "one"), (b"", "two")])
    html = write_report(raw, quality).html.read_text(encoding="utf-8")
    assert "image_unreadable" in html and "image_empty" in html
    assert "source.parquet:row 0" in html and "source.parquet:row 1" in html
    assert "Worst samples" not in html


def test_an_unfinished_assessment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="was never finished"):
        write_report(tmp_path, tmp_path)


def test_single_images_are_found_by_their_digest(tmp_path: Path) -> None:
    images = [encode(picture(seed)) for seed in range(5)]
    raw, _ = assessed(tmp_path, [(image, "text") for image in images])
    from mllm_assets.data.ingest.images import sha256

    wanted = {sha256(images[1]): images[1], sha256(images[4]): images[4]}
    assert find_images(raw, wanted.keys()) == wanted
    assert find_images(raw, {"no such image"}) == {}


def test_a_histogram_of_one_value_can_be_drawn() -> None:
    import numpy as np

    assert histograms_png([Histogram("one", np.array([5.0, 5.0])), Histogram("ints", np.array([3]))])[1:4] == b"PNG"


def test_a_cell_holds_text_only() -> None:
    assert markdown_cell("a|b\n<i>") == "a&#124;b &#60;i&#62;"
    assert markdown_cell(None) == ""
