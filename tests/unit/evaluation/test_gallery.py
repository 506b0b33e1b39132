"""Galleries."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from mllm_assets.evaluation.gallery import (
    MAX_MARKDOWN_BYTES,
    collect_samples,
    render_html,
    render_markdown,
    write_gallery,
)
from mllm_assets.evaluation.table import to_table
from tests.unit.evaluation.made_predictions import prediction, predictions


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for index in range(6):
        Image.effect_noise((200, 150), 90).save(tmp_path / "images" / f"{index}.png")
    return tmp_path


def html_of(table: pa.Table, data_dir: Path, title: str = "pets") -> str:
    return render_html(collect_samples(table), data_dir=data_dir, title=title)


def test_each_sample_shows_both_answers_and_what_tuning_changed(data_dir: Path) -> None:
    html = html_of(predictions(), data_dir)
    assert html.count("<article") == 6
    assert [sample["change"] for sample in collect_samples(predictions())] == [
        "fixed", "right", "fixed", "fixed", "fixed", "wrong",
    ]  # fmt: skip
    assert html.count('<div class="answer wrong"><div class="who">base') == 5
    assert html.count('<div class="answer right"><div class="who">tuned') == 5
    assert "fixed by tuning (4)" in html and "broken by tuning" not in html
    assert "83.3 %" in html and "16.7 %" in html


def test_the_page_needs_no_other_file_and_no_network(data_dir: Path) -> None:
    html = html_of(predictions(), data_dir)
    assert re.findall(r'(?:src|href)="(?!data:image/webp;base64,)', html) == []
    assert "http" not in html


def test_what_a_model_says_cannot_become_markup(data_dir: Path) -> None:
    """A model may say anything, `<script>` and Markdown included."""
    table = predictions(answer="<script>alert(1)</script> [x](http://y) `z` | *w*", sample_id='"><u>')
    html = html_of(table, data_dir, title="<i>")
    assert "<script>alert" not in html and '"><u>' not in html and "<i>" not in html
    line = render_markdown(collect_samples(table), data_dir=data_dir).splitlines()[2]
    assert "<script>" not in line and "[x]" not in line and line.count("|") == 8


def test_captions_without_labels_are_shown_without_a_verdict(data_dir: Path) -> None:
    table = predictions(label=None, answer="a bird on a branch")
    html = html_of(table, data_dir)
    assert 'class="mark"' not in html and "right answers" not in html and 'data-change="fixed"' not in html


def test_samples_without_images_or_answers_are_shown(data_dir: Path) -> None:
    html = html_of(predictions(images=[], answer="", loss_shuffled_nats=None), data_dir)
    assert "(no answer)" in html and "<img" not in html


def test_markdown_stays_small_enough_for_metadata(data_dir: Path) -> None:
    rows: list[dict[str, Any]] = []
    for model in ("base", "tuned"):
        rows += [
            prediction(model, 0, row_index=i, images=[f"images/{j % 6}.png" for j in range(20)]) for i in range(40)
        ]
    text = render_markdown(collect_samples(to_table(rows)), data_dir=data_dir)
    assert len(text.encode()) <= MAX_MARKDOWN_BYTES
    assert text.splitlines()[0] == "| | image | asked | right answer | base model | tuned model | loss |"
    assert len(text.splitlines()) > 4


def test_in_markdown_a_wrong_answer_is_cut_short_and_each_has_its_mark(data_dir: Path) -> None:
    """The gibberish of an untrained base model pushed the tuned model's answer out of sight."""
    rows = [prediction("base", 0, answer="op " * 400), prediction("tuned", 0)]
    [line] = render_markdown(collect_samples(to_table(rows)), data_dir=data_dir).splitlines()[2:]
    *_, base, tuned, _ = line.split(" | ")
    mark, _, text = base.partition(") ")
    assert mark.startswith("![wrong](data:image/png;base64,") and text == "op op op op op op op op op …"
    mark, _, text = tuned.partition(") ")
    assert mark.startswith("![right](data:image/png;base64,") and text == "cat"


def test_a_large_set_is_shown_evenly_spaced(data_dir: Path) -> None:
    rows = [prediction(m, 0, row_index=i, sample_id=f"s{i}", images=[]) for m in ("base", "tuned") for i in range(1200)]
    html = html_of(to_table(rows), data_dir)
    assert html.count("<article") == 500
    assert "1200 evaluation samples; 500 of them are shown" in html and "s1197" in html


def test_both_galleries_are_written(data_dir: Path, tmp_path: Path) -> None:
    write_gallery(tmp_path, predictions(), data_dir=data_dir, title="pets")
    assert (tmp_path / "gallery.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (tmp_path / "gallery.md").read_text(encoding="utf-8").count("data:image/webp") == 6


def test_markdown_shows_first_what_is_hard_and_what_tuning_changed_most(data_dir: Path) -> None:
    """Twelve of thirty, each once: four of each kind."""
    losses = {"tuned": lambda i: 1.0 + (i == 17) * 5, "base": lambda i: 2.0 + (i == 3) * 5 - (i == 20) * 1.5}
    rows = [
        prediction(model, 0, row_index=i, images=[f"images/{i % 6}.png"], sample_id=str(i), prompt=f"number {i}?",
                   loss_nats=loss(i))
        for model, loss in losses.items() for i in range(30)
    ]  # fmt: skip
    lines = render_markdown(collect_samples(to_table(rows)), data_dir=data_dir).splitlines()[2:]
    assert len(lines) == len({line.split(" | ")[2] for line in lines}) == 12
    firsts = {line.split(" | ")[0]: line for line in reversed(lines)}
    assert "number 17?" in firsts["| hardest"] and "2.00 → 6.00" in firsts["| hardest"]
    assert "number 3?" in firsts["| gained most"] and "number 20?" in firsts["| gained least"]


def test_the_page_can_be_sorted_by_gain_and_by_loss_and_by_use_of_the_image(data_dir: Path) -> None:
    html = html_of(predictions(), data_dir)
    assert re.findall(r'<option value="(.*?)">', html) == ["index", "-loss", "loss", "-gain", "gain", "image"]
    gains = [float(gain) for gain in re.findall(r'data-gain="(.*?)"', html)]
    assert gains == pytest.approx([2.0] * 6)
    tuned = [prediction("tuned", index) for index in range(3)]
    assert "gained" not in html_of(to_table(tuned), data_dir)
