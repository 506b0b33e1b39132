"""Pictures inside a page: histograms, thumbnails, and text that is neither Markdown nor HTML of its own."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm_assets.data.images import open_image, upright_rgb

MAX_CELL_CHARS = 120
NUM_BINS = 40


@dataclass(frozen=True, slots=True)
class Histogram:
    """Values of one measure; those below `limit` are flagged. `span` fixes the axis."""

    title: str
    values: np.ndarray
    limit: float | None = None
    span: tuple[float, float] | None = None


def histograms_png(charts: Sequence[Histogram], *, num_columns: int = 4) -> bytes:
    """All histograms in one PNG, on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    num_rows = -(-len(charts) // num_columns)
    figure = Figure(figsize=(3.1 * num_columns, 2.0 * num_rows), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for axis in list(axes)[len(charts) :]:
        axis.set_axis_off()
    for axis, chart in zip(figure.axes, charts, strict=False):
        values = np.asarray(chart.values, dtype=np.float64)
        low, high = chart.span or (float(values.min()), float(values.max()))
        if low == high and chart.span is None:
            low, high = low - 1, high + 1
        bins: int | np.ndarray = NUM_BINS
        whole = np.issubdtype(np.asarray(chart.values).dtype, np.integer)
        if whole:  # bins of whole numbers, or some stay empty
            step = -(-int(high - low + 1) // NUM_BINS)
            bins = np.arange(low - 0.5, high + step, step)
        counts, edges = np.histogram(values, bins=bins, range=(low, high))
        flagged = np.zeros(len(counts), bool) if chart.limit is None else edges[1:] <= chart.limit + 1e-9
        colors = np.where(flagged, "#d9534f", "#5b6ee1")
        axis.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=colors, linewidth=0)
        title = chart.title
        if chart.limit is not None:
            axis.axvline(chart.limit, color="#d9534f", linewidth=1, linestyle=":")
            title += f" ({int((values < chart.limit).sum())} flagged)"
        axis.set_title(title, fontsize=8, loc="left", color="#1c2733")
        axis.tick_params(labelsize=7, colors="#5d6b7a", length=2)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=whole))
        axis.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#c5ccd4")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def png_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def thumbnail(content: bytes, max_edge_px: int) -> str:
    """A `data:` URI of the upright picture on white, at most `max_edge_px` wide and high; tiny ones stay tiny."""
    with open_image(content) as image:
        image.load()
        small = upright_rgb(image)
    small.thumbnail((max_edge_px, max_edge_px))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def markdown_cell(value: Any) -> str:
    """Any value as the text of one table cell."""
    text = " ".join("" if value is None else str(value).split())
    text = text if len(text) <= MAX_CELL_CHARS else text[: MAX_CELL_CHARS - 1] + "…"
    return re.sub(r"[\\`*_\[\]<>|&~#!$]", lambda match: f"&#{ord(match[0])};", text)
