"""A page to look at: each sample's image, what was asked, the right answer, and what both models answered.

`gallery.html` holds its pictures and needs neither network nor server; `gallery.md` is small enough for an asset's
metadata.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from mllm_assets.artifacts import write_text_atomic
from mllm_assets.data.quality.report import thumbnail
from mllm_assets.evaluation.scores import find_label, token_mean
from mllm_assets.pages import page_template

GALLERY = "gallery.html"
MAX_HTML_SAMPLES = 500  # about 5 KB each
MAX_MARKDOWN_SAMPLES = 12
MAX_MARKDOWN_BYTES = 190_000  # Dagster+ answers 413 above about 1 MB, and several assets share a page
HTML_THUMBNAIL_PX = 224
MARKDOWN_THUMBNAIL_PX = 72
MAX_CELL_CHARS = 60
MAX_WRONG_CHARS = 28
MARK_PX = 16


def write_gallery(directory: Path, predictions: pa.Table, *, data_dir: Path, title: str) -> None:
    """Write `gallery.html` and `gallery.md` of predictions, whose image paths are relative to `data_dir`."""
    samples = collect_samples(predictions)
    write_text_atomic(directory / GALLERY, render_html(samples, data_dir=data_dir, title=title))
    write_text_atomic(directory / "gallery.md", render_markdown(samples, data_dir=data_dir))


def collect_samples(predictions: pa.Table) -> list[dict[str, Any]]:
    """Put both models' rows of a sample together, and judge them where that can be done.

    Returns:
        A dict per sample: the tuned row's columns, `models` (model -> row and `right`, which is None where the sample
        has no label and the answer is not the very reference), and `change`: "fixed", "broken", "right", "wrong" or
        "" if unknown.
    """
    grouped: dict[tuple[str, int], dict[str, Any]] = {}
    for row, right in zip(predictions.to_pylist(), rights_of(predictions), strict=True):
        judged = row | {"right": right}
        sample = grouped.setdefault((row["entry"], row["row_index"]), row | {"models": {}})
        sample["models"][row["model"]] = judged
    return [sample | {"change": _change(sample["models"])} for _, sample in sorted(grouped.items())]


def rights_of(predictions: pa.Table) -> list[bool | None]:
    """Whether each answer names its sample's label; without one, True where it is the very reference, else None."""
    columns = [predictions[name].to_pylist() for name in ("entry", "label", "reference", "answer")]
    labels: dict[str, set[str]] = {}
    for entry, label in zip(*columns[:2], strict=True):
        labels.setdefault(entry, set()).update([] if label is None else [label])
    known = {entry: sorted(found) for entry, found in labels.items()}
    return [
        (True if answer.strip() == reference.strip() else None)
        if label is None
        else find_label(answer, known[entry]) == label
        for entry, label, reference, answer in zip(*columns, strict=True)
    ]


def _change(models: Mapping[str, Mapping[str, Any]]) -> str:
    judged = tuple(models[name]["right"] if name in models else None for name in ("base", "tuned"))
    changes: Mapping[Any, str] = {
        (False, True): "fixed",
        (True, False): "broken",
        (True, True): "right",
        (False, False): "wrong",
    }
    return changes.get(judged, "")


def render_html(samples: Sequence[Mapping[str, Any]], *, data_dir: Path, title: str) -> str:
    """One self-contained page; of more than `MAX_HTML_SAMPLES` samples, evenly spaced ones."""
    shown = evenly_spaced(samples, MAX_HTML_SAMPLES)
    has_gain = any(_gain(sample) is not None for sample in samples)
    return page_template("mllm_assets.evaluation", "gallery.html.jinja").render(
        title=title,
        summary=_summary(samples),
        num_samples=len(samples),
        changes={name: sum(sample["change"] == name for sample in shown) for name in _CHANGES},
        change_titles=_CHANGES,
        has_gain=has_gain,
        samples=[
            {
                **sample,
                "gain_nats": _gain(sample),
                "thumbnails": [thumbnail(data_dir / path, HTML_THUMBNAIL_PX) for path in sample["images"]],
            }
            for sample in shown
        ],
    )


_CHANGES = {"fixed": "fixed by tuning", "broken": "broken by tuning", "right": "both right", "wrong": "both wrong"}


def _gain(sample: Mapping[str, Any]) -> float | None:
    """How much lower the tuned model's loss is than the base model's; None where one of them was not asked."""
    models = sample["models"]
    return models["base"]["loss_nats"] - models["tuned"]["loss_nats"] if {"base", "tuned"} <= models.keys() else None


def _summary(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per model the share of right answers (None without labels) and the mean losses per token."""
    result = []
    for model in ("base", "tuned"):
        rows = [sample["models"][model] for sample in samples if model in sample["models"]]
        judged = [row["right"] for row in rows]
        known = bool(rows) and None not in judged
        result.append(
            {
                "model": model,
                "accuracy": sum(judged) / len(judged) if known else None,
                "loss": _mean_loss(rows, "loss_nats"),
                "loss_shuffled": _mean_loss(rows, "loss_shuffled_nats"),
            }
        )
    return result


def _mean_loss(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    losses = np.array([row[column] for row in rows], float)  # None becomes NaN
    return token_mean(losses, np.array([row["num_supervised_tokens"] for row in rows]))


def render_markdown(samples: Sequence[Mapping[str, Any]], *, data_dir: Path) -> str:
    """A table of a few samples, the hardest first, then where tuning gained most, below `MAX_MARKDOWN_BYTES`."""
    header = "| | image | asked | right answer | base model | tuned model | loss |"
    lines = [header, "|" + " --- |" * (header.count("|") - 1)]
    size = sum(map(len, lines))
    for why, sample in _worth_a_look(samples):
        pictures = " ".join(f"![]({thumbnail(data_dir / p, MARKDOWN_THUMBNAIL_PX)})" for p in sample["images"])
        asked = [sample["models"][model] for model in ("base", "tuned") if model in sample["models"]]
        losses = [f"{row['loss_nats']:.2f}" for row in asked]
        texts = (_cell(sample["prompt"]), _cell(sample["reference"]), *map(_answer_cell, asked))
        cells = [why, pictures, *texts, " → ".join(losses)]
        line = "| " + " | ".join(cells) + " |"
        size += len(line.encode()) + 1
        if size > MAX_MARKDOWN_BYTES:
            break
        lines.append(line)
    return "\n".join(lines) + "\n"


def _worth_a_look(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Each sample once: those of the highest loss, of the most gain, of the least, and a few others."""

    def loss(sample: Mapping[str, Any]) -> float:
        return sample["models"].get("tuned", sample)["loss_nats"]

    orders = {"hardest": sorted(samples, key=loss, reverse=True)}
    if all(_gain(sample) is not None for sample in samples):
        by_gain = sorted(samples, key=lambda sample: _gain(sample) or 0.0)
        orders |= {"gained most": by_gain[::-1], "gained least": by_gain}
    picked: dict[tuple[str, int], tuple[str, Mapping[str, Any]]] = {}
    each = MAX_MARKDOWN_SAMPLES // (len(orders) + 1)
    for why, ordered in (*orders.items(), ("", evenly_spaced(samples, MAX_MARKDOWN_SAMPLES))):
        most = each if why else MAX_MARKDOWN_SAMPLES - len(picked)
        fresh = [sample for sample in ordered if (sample["entry"], sample["row_index"]) not in picked]
        picked |= {(sample["entry"], sample["row_index"]): (why, sample) for sample in fresh[:most]}
    return list(picked.values())


def evenly_spaced(samples: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """At most `most` of them, evenly spaced over their order."""
    if len(samples) <= most:
        return list(samples)
    return [samples[index * len(samples) // most] for index in range(most)]


def _answer_cell(row: Mapping[str, Any]) -> str:
    """An answer with its mark; of a wrong one, which may be gibberish of any length, the beginning will do."""
    most = MAX_WRONG_CHARS if row["right"] is False else MAX_CELL_CHARS
    return f"{_mark(row['right'])} {_cell(row['answer'], most)}".strip()


@cache
def _mark(right: bool | None) -> str:
    """A green tick or a red cross, drawn: not every machine has a font of emoji."""
    if right is None:
        return ""
    scale = 4
    picture = Image.new("RGBA", (MARK_PX * scale, MARK_PX * scale))
    draw = ImageDraw.Draw(picture)
    lines = [[(12, 34), (26, 48), (54, 16)]] if right else [[(14, 14), (50, 50)], [(50, 14), (14, 50)]]
    for line in lines:
        draw.line(line, fill="#16a34a" if right else "#dc2626", width=11, joint="curve")
    buffer = io.BytesIO()
    picture.resize((MARK_PX, MARK_PX)).save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"![{'right' if right else 'wrong'}](data:image/png;base64,{text})"


def _cell(text: str, most: int = MAX_CELL_CHARS) -> str:
    """What a person or a model wrote, as text of one table cell: neither Markdown nor HTML of its own."""
    text = " ".join(text.split())
    text = text if len(text) <= most else text[: most - 1] + "…"
    return re.sub(r"[\\`*_\[\]<>|&~#!$]", lambda match: f"&#{ord(match[0])};", text)
