"""A page on a dataset's quality: counts, histograms, the worst samples, duplicates side by side, odd captions.

`report.html` embeds its pictures and needs no network or server; `report.md` is small enough for an asset's metadata.
Both are made from the files of an assessment, by the queries of DuckDB's saved views.
"""

import base64
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from mllm_assets.artifacts import read_manifest, write_text_atomic
from mllm_assets.data.ingest.flags import PROBES
from mllm_assets.data.ingest.images import open_picture, upright_rgb
from mllm_assets.data.ingest.raw_files import find_images
from mllm_assets.data.quality.record import define_rows
from mllm_assets.data.quality.store import CONFIG
from mllm_assets.data.quality.views import view_sql
from mllm_assets.pages import page_template
from mllm_assets.progress import doing

REPORT_HTML, REPORT_MARKDOWN = "report.html", "report.md"
MAX_MARKDOWN_BYTES = 190_000  # Dagster+ answers 413 above about 1 MB, and several assets share a page
NUM_WORST, NUM_PAIRS, NUM_CAPTIONS, NUM_REJECTS = 24, 12, 8, 8
NUM_MARKDOWN_WORST, NUM_MARKDOWN_PAIRS = 8, 4
WORST_COLUMNS = ("issue", "score", "score_limit", "source_location", "caption")
HTML_THUMBNAIL_PX, MARKDOWN_THUMBNAIL_PX = 224, 96
MAX_CELL_CHARS = 120
NUM_BINS = 40
PAIR_ORDER = "kind DESC, distance_bits DESC, color_distance DESC, sample_a, sample_b"


@dataclass(frozen=True, slots=True)
class Histogram:
    """Values of one measure; those below `limit` are flagged. `span` fixes the axis."""

    title: str
    values: np.ndarray
    limit: float | None = None
    span: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """The path of the page, and its short form for an asset's metadata."""

    html: Path
    markdown: str


@doing("write the quality report")
def write_report(raw: Path, quality: Path) -> Report:
    """Write `report.html` and `report.md` into a finished assessment; an existing report is kept.

    Raises:
        IntegrityError: `quality` was never finished, or `raw` is damaged.
    """
    manifest = read_manifest(quality)
    html, markdown = quality / REPORT_HTML, quality / REPORT_MARKDOWN
    if not (html.is_file() and markdown.is_file()):
        facts = _collect(raw, quality, manifest)
        write_text_atomic(markdown, _render_markdown(facts))
        write_text_atomic(html, _render_html(facts))
    return Report(html, markdown.read_text(encoding="utf-8"))


def _collect(raw: Path, quality: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    with duckdb.connect(config=CONFIG) as connection:
        _define_views(connection, raw, quality, manifest)

        def rows(sql: str) -> list[dict[str, Any]]:
            return connection.sql(sql).to_arrow_table().to_pylist()

        facts: dict[str, Any] = {
            "dataset": manifest["dataset"],
            "digest": manifest["digest"],
            "counts": rows(
                "SELECT count(*) AS num_samples, count(reject_reason) AS num_rejected, "
                "count(*) FILTER (len(flags) > 0) AS num_flagged, "
                "count(duplicate_group) - count(DISTINCT duplicate_group) AS num_duplicates FROM verdicts"
            )[0],
            "flags": rows(
                "SELECT unnest(flags) AS name, count(*) AS count FROM verdicts GROUP BY 1 ORDER BY 2 DESC, 1"
            ),
            "reasons": rows(
                "SELECT reject_reason AS name, count(*) AS count, "
                "min_by(coalesce(source_location, sample_id), row_index) AS example "
                "FROM latest_verdicts WHERE reject_reason IS NOT NULL GROUP BY 1 ORDER BY 2 DESC, 1"
            ),
            "rejects": rows(
                "SELECT coalesce(source_location, sample_id) AS name, reject_reason AS count "
                f"FROM latest_verdicts WHERE reject_reason IS NOT NULL ORDER BY row_index LIMIT {NUM_REJECTS}"
            ),
            # what is shown is chosen before its texts are joined: those of all samples do not fit
            "worst": rows(
                f"WITH w AS (SELECT * FROM worst ORDER BY rank LIMIT {NUM_WORST}) "
                "SELECT w.*, caption FROM w JOIN texts USING (sample_id) ORDER BY rank"
            ),
            "num_pairs": rows("SELECT kind AS name, count(*) AS count FROM pair_rows GROUP BY 1 ORDER BY 1"),
            # the near pairs that differ most are the most doubtful
            "pairs": rows(
                f"WITH p AS (SELECT * FROM pair_rows ORDER BY {PAIR_ORDER} LIMIT {NUM_PAIRS}) "
                "SELECT p.*, a.caption AS caption_a, b.caption AS caption_b, a.source_location AS location_a, "
                "b.source_location AS location_b FROM p JOIN texts a ON a.sample_id = p.sample_a "
                f"JOIN texts b ON b.sample_id = p.sample_b ORDER BY {PAIR_ORDER}"
            ),
            "same_captions": rows(
                "WITH c AS (SELECT hash(lower(trim(caption))) AS key, count(*) AS count FROM texts "
                "WHERE caption IS NOT NULL GROUP BY key HAVING count(*) > 1 "
                f"ORDER BY 2 DESC, 1 LIMIT {NUM_CAPTIONS}) SELECT min(caption) AS caption, any_value(count) AS count "
                "FROM texts JOIN c ON hash(lower(trim(caption))) = key GROUP BY key ORDER BY 2 DESC, 1"
            ),
            "repetitive_captions": rows(
                "WITH v AS (SELECT sample_id, round(caption_repeated_share, 2) AS count FROM verdicts "
                f"WHERE caption_repeated_share > 0 ORDER BY 2 DESC, 1 LIMIT {NUM_CAPTIONS}) "
                "SELECT caption, count FROM v JOIN texts USING (sample_id) ORDER BY 2 DESC, 1"
            ),
        }
        charts = _charts(connection)
    image = base64.b64encode(histograms_png(charts)).decode("ascii") if charts else None
    facts["histograms"] = image and f"data:image/png;base64,{image}"
    shown = {row["image_sha256"] for row in facts["worst"]}
    shown |= {row[side] for row in facts["pairs"] for side in ("image_a", "image_b")}
    facts["images"] = find_images(raw, shown)
    return facts


def _define_views(connection: duckdb.DuckDBPyConnection, raw: Path, quality: Path, manifest: Mapping[str, Any]) -> None:
    """Define the tables that the saved views query, over this one assessment."""
    define_rows(connection, raw, quality)
    thresholds = json.dumps(manifest["spec"]).replace("'", "''")
    tables = {
        "assessments": "SELECT 'd' AS dataset, 'r' AS run_id, 'q' AS quality_digest, 's' AS raw_digest, "
        f"'{thresholds}'::JSON AS thresholds, now() AS written_at",
        "sample_versions": "SELECT 'd' AS dataset, 's' AS raw_digest, sample_id, source_location, source_id, "
        "source_detail FROM texts",
        "verdicts": "SELECT 'd' AS dataset, 'q' AS quality_digest, * FROM sample_rows",
        "images": "SELECT dataset, sample_id, unnest(image_ids) AS image_sha256 FROM verdicts",
        "image_quality": "SELECT *, 1 AS probe_version FROM image_rows",
    }
    for name, sql in tables.items():
        connection.execute(f"CREATE VIEW {name} AS {sql}")
    for name in ("latest_assessments", "latest_verdicts", "score_limits", "image_scores", "worst"):
        connection.execute(f"CREATE VIEW {name} AS {view_sql(name)}")


def _charts(connection: duckdb.DuckDBPyConnection) -> list[Histogram]:
    limits = dict(connection.sql("SELECT issue, score_limit FROM score_limits").fetchall())
    charts = []
    for name, probe in PROBES.items():
        if probe.sql:
            values = connection.sql(f"SELECT score FROM image_scores WHERE issue = '{name}'").fetchnumpy()["score"]
            charts.append(Histogram(probe.title or name, values, limit=limits[name], span=(0.0, 1.0)))
    size = "sqrt(width_px::DOUBLE * height_px)"
    values = connection.sql(f"SELECT {size} AS v FROM image_quality WHERE width_px IS NOT NULL").fetchnumpy()["v"]
    charts.append(Histogram("size: square root of the area, px", values))
    for title, column in (("caption: tokens", "caption_num_tokens"), ("caption: characters", "caption_num_chars")):
        values = connection.sql(f"SELECT {column} AS v FROM verdicts WHERE caption_num_chars > 0").fetchnumpy()["v"]
        charts.append(Histogram(title, values))
    return [chart for chart in charts if len(chart.values)]


def _render_html(facts: Mapping[str, Any]) -> str:
    pictures = {key: thumbnail(data, HTML_THUMBNAIL_PX) for key, data in facts["images"].items()}
    return page_template("mllm_assets.data.quality", "report.html.jinja").render(**{**facts, "images": pictures})


def _render_markdown(facts: Mapping[str, Any]) -> str:
    """The same, shorter; sections that would make it too large are left out."""
    counts = facts["counts"]
    sections = [
        f"{counts['num_samples']} samples, {counts['num_rejected']} rejected, {counts['num_flagged']} flagged, "
        f"{counts['num_duplicates']} duplicates.",
        markdown_table(
            ("rejected for", "samples", "the first of them"),
            ((row["name"], row["count"], row["example"]) for row in facts["reasons"]),
        ),
        markdown_table(("flagged as", "samples"), ((row["name"], row["count"]) for row in facts["flags"])),
        f"![histograms]({facts['histograms']})" if facts["histograms"] else "",
        markdown_table(
            ("worst samples", "issue", "score", "limit", "where", "caption"),
            (
                (_picture(facts, row["image_sha256"]), *(row[key] for key in WORST_COLUMNS))
                for row in facts["worst"][:NUM_MARKDOWN_WORST]
            ),
        ),
        markdown_table(
            ("duplicates", "", "kind", "bits apart", "where", "captions"),
            (
                (
                    _picture(facts, row["image_a"]),
                    _picture(facts, row["image_b"]),
                    row["kind"],
                    row["distance_bits"],
                    f"{row['location_a'] or row['sample_a']} / {row['location_b'] or row['sample_b']}",
                    f"{row['caption_a'] or ''} / {row['caption_b'] or ''}",
                )
                for row in facts["pairs"][:NUM_MARKDOWN_PAIRS]
            ),
        ),
    ]
    kept: list[str] = []
    num_bytes = 0
    for section in sections:
        num_bytes += len(section.encode()) + 2
        if section and num_bytes <= MAX_MARKDOWN_BYTES:
            kept.append(section)
    return "\n\n".join(kept) + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as a table, "" if there are none; a cell that begins with a picture is one already."""
    lines = [
        "| " + " | ".join(cell if str(cell).startswith("![") else markdown_cell(cell) for cell in row) + " |"
        for row in rows
    ]
    return "\n".join(["| " + " | ".join(header) + " |", "|" + " --- |" * len(header), *lines]) if lines else ""


def _picture(facts: Mapping[str, Any], image_id: str) -> str:
    return f"![]({thumbnail(facts['images'][image_id], MARKDOWN_THUMBNAIL_PX)})"


def histograms_png(charts: Sequence[Histogram], *, num_columns: int = 4) -> bytes:
    """All histograms in one PNG, on white."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    num_rows = -(-len(charts) // num_columns)
    figure = Figure(figsize=(3.1 * num_columns, 2.0 * num_rows), layout="constrained", dpi=110)
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
        if whole:  # bins of whole numbers, or some would be empty
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


def thumbnail(content: bytes | Path, max_edge_px: int) -> str:
    """A `data:` URI of the upright picture on white, at most `max_edge_px` wide and high; never enlarged."""
    with open_picture(content) as image:
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
