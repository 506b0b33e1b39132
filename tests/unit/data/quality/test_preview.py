"""The eight rows in an asset's metadata: pictures are shown, what cannot be decoded is named, texts are only texts."""

import base64
import json

import pytest

from mllm_assets.data.curate import sample_page
from mllm_assets.data.ingest.spec import DEFAULT_LIMITS
from mllm_assets.data.quality.preview import NUM_ROWS, preview_rows, preview_source
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import encode, made_spec, picture, png, run_line, write_source

pytestmark = pytest.mark.not_fast


def test_rows_of_a_source_are_shown_from_all_its_parts(layout: Layout) -> None:
    small, large = png(0), encode(picture(1, 700), "JPEG", quality=95)
    rows = [(small, "first"), (large, "a <b>bold</b> | text"), (png(2)[:300], "cut off"), (b"text", "no picture")]
    rows += [(png(number), f"picture {number}") for number in range(4, 40)]
    write_source(layout.root, rows)
    raw, _, version = run_line(made_spec(8, 2), layout)
    lines = preview_source(raw.directory, DEFAULT_LIMITS).splitlines()[2:]
    assert [line.rpartition("row ")[2] for line in lines] == [f"{n * 40 // NUM_ROWS} |" for n in range(NUM_ROWS)]
    assert f"![](data:image/png;base64,{base64.b64encode(small).decode()})" in lines[0]

    write_source(layout.root, rows[:8])
    raw, *_ = run_line(made_spec(3, 1), layout, "run-2")
    lines = preview_source(raw.directory, DEFAULT_LIMITS).splitlines()[2:]
    assert "![](data:image/webp;base64," in lines[1] and "&#60;b&#62;bold" in lines[1] and "<b>" not in lines[1]
    assert "image&#95;unreadable" in lines[3] and "no picture" in lines[3]

    train = version.directory / "train.json"
    lines = preview_rows(train, layout.data, 8).splitlines()
    assert len(lines) == 2 + 8 and all("![](data:image/webp;base64," in line for line in lines[2:])
    assert "What is this?" in "".join(lines) and "&#60;image" not in "".join(lines)

    [row, *_] = json.loads(train.read_text())
    question, answer = row["messages"]
    many = [{**row, "messages": [question, {**answer, "content": f"class {n // 3}"}]} for n in range(3 * NUM_ROWS)]
    (layout.data / "many.json").write_text(json.dumps(many))
    lines = preview_rows(layout.data / "many.json", layout.data, len(many)).splitlines()[2:]
    assert [line.rpartition("class ")[2] for line in lines] == [f"{n} |" for n in range(NUM_ROWS)]


def test_a_source_of_fewer_rows_is_shown_whole(layout: Layout) -> None:
    write_source(layout.root, [(png(number), f"picture {number}") for number in range(4)])
    raw, *_ = run_line(made_spec(2, 1), layout)
    assert len(preview_source(raw.directory, DEFAULT_LIMITS).splitlines()) == 2 + 4


def test_no_picture_that_was_rejected_is_decoded_for_the_page(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that is too small may be one that a decoder does not survive: it was judged by its size alone."""
    decoded: list[bytes] = []
    real = sample_page.thumbnail
    monkeypatch.setattr(sample_page, "thumbnail", lambda data, edge: decoded.append(data) or real(data, edge))
    tiny, without_text = png(20, 4), png(21)
    rows = [*((png(number), f"picture {number}") for number in range(6)), (tiny, "small"), (without_text, "")]
    write_source(layout.root, rows)
    run_line(made_spec(3, 1, num_test=1), layout)
    assert without_text in decoded and tiny not in decoded
    assert len(decoded) == 1 + 1, "the sample that is unused, and the one without a text"
