"""What the board's tabs show, as HTML; all that comes from outside is escaped by the templates."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from html import escape
from itertools import chain
from pathlib import Path

from mllm_assets.data.curate.review import ReviewedSample
from mllm_assets.data.ingest.images import PictureError
from mllm_assets.data.quality.browse import SamplePage
from mllm_assets.data.quality.report import thumbnail
from mllm_assets.evaluation.one_model import Scored
from mllm_assets.evaluation.scores import in_order
from mllm_assets.evaluation.side_by_side import Line, Pair
from mllm_assets.pages import page_template
from mllm_assets.releases.candidate import Considered
from mllm_assets.training.runs.history import KnownRun, answer_curves, curve, measured_curves, smoothed

THUMBNAIL_PX = 224
COLORS = ("#4f43dd", "#d9730d", "#1a7f4b", "#c2255c", "#0b7285", "#8a6d00", "#7048e8", "#5d6b7a")
NUM_ANSWERS_SHOWN = 3  # of the evaluations of a run
WIDTH, HEIGHT, LEFT, BOTTOM = 1120, 320, 58, 34  # of the picture of curves, in its own units


def _rendered(name: str, **values: object) -> str:
    return page_template("mllm_assets.cli.board", f"{name}.html.jinja").render(**values)


@lru_cache(maxsize=512)  # pictures of pages that were just seen, about 5 KB each
def _cached(path: Path, changed_ns: int) -> str:
    return thumbnail(path, THUMBNAIL_PX)


def picture(path: Path | None) -> str | None:
    """A small copy as a `data:` URI, or None if there is none that can be read."""
    if path is None:
        return None
    try:
        return _cached(path, path.stat().st_mtime_ns)
    except (OSError, PictureError):
        return None


def samples_view(page: SamplePage) -> str:
    return _rendered("samples", samples=[(sample, picture(sample.image)) for sample in page.samples])


def pairs_view(pairs: Sequence[Pair], titles: tuple[str, str]) -> str:
    shown = [(pair, [picture(path) for path in pair.images]) for pair in pairs]
    return _rendered("pairs", pairs=shown, titles=titles)


def table_view(runs: Sequence[KnownRun], lines: Sequence[Line], titles: Sequence[str]) -> str:
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.group, []).append(line)
    return _rendered("runs", runs=runs, titles=titles, groups=groups, colors=COLORS)


def curves_view(runs: Sequence[KnownRun], titles: Sequence[str], *, smooth: float, logarithmic: bool) -> str:
    """The losses of runs over their steps, in one picture: training as a line, evaluation as dots.

    Metrics of answers are texts below it, the newest of each, since they have other units.
    """
    series, answers = [], []
    for index, (run, title) in enumerate(zip(runs, titles, strict=True)):
        log = run.log
        losses = curve(log, "loss")
        lines = {"logged": losses if smooth else [], "loss": smoothed(losses, smooth)}
        lines["eval_loss"] = [*chain(*measured_curves(log).values())]
        for key, measured in answer_curves(log).items():
            shown = ", ".join(f"{value:.4f} at step {step}" for step, value in measured[-NUM_ANSWERS_SHOWN:])
            answers.append((title, f"{key}: {shown}"))
        usable = {key: [p for p in points if math.isfinite(p[1]) and (p[1] > 0 or not logarithmic)]
                  for key, points in lines.items()}  # fmt: skip
        series.append((title, COLORS[index % len(COLORS)], usable))
    points = [point for _, _, lines in series for some in lines.values() for point in some]
    if not points:
        return _rendered("curves", series=[], ticks_x=[], ticks_y=[], width=WIDTH, height=HEIGHT, left=LEFT, bottom=0,
                         answers=answers)  # fmt: skip
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    values = [scale(value) for _, value in points]
    low, high = (min(values), max(values)) if logarithmic else (min(0.0, *values), max(values))
    last = max(step for step, _ in points)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 16) * step / max(last, 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 14) * (value - low) / ((high - low) or 1.0)

    drawn = [
        (title, color, {key: [(x(s), y(scale(v)), s, v) for s, v in some] for key, some in lines.items()})
        for title, color, lines in series
    ]
    heights = [low + (high - low) * part / 4 for part in range(5)]
    ticks_y = [(y(height), f"{10**height if logarithmic else height:.3g}") for height in heights]
    ticks_x = [(x(last * part / 5), f"{round(last * part / 5)}") for part in range(6)]
    return _rendered(
        "curves", series=drawn, ticks_x=ticks_x, ticks_y=ticks_y, width=WIDTH, height=HEIGHT, left=LEFT, bottom=BOTTOM,
        answers=answers,
    )  # fmt: skip


def titles_of(runs: Sequence[KnownRun]) -> list[str]:
    """A name for each run; those that two runs share get the beginning of the hash behind them, or all of it."""
    names = [run.name for run in runs]
    short = [f"{run.name} · {run.directory.name[:6]}" for run in runs]
    return [
        name if names.count(name) == 1 else begun if short.count(begun) == 1 else f"{name} · {run.directory.name}"
        for name, begun, run in zip(names, short, runs, strict=True)
    ]


def considered_view(considered: Considered, gates: Mapping[str, str]) -> str:
    """A model that a person decides about, and what was decided."""
    return _rendered("considered", considered=considered, gates=gates)


def scored_view(scored: Scored) -> str:
    """What a model scored on entries, beside the most common answer."""
    entries = [(name, facts, in_order(facts["metrics"])) for name, facts in scored.entries.items()]
    return _rendered("scored", model=scored.model, entries=entries)


def review_view(sample: ReviewedSample | None, number: int, num_matching: int) -> str:
    """A sample that a person decides about, the `number`-th of those that match, and what was decided."""
    shown = picture(sample.seen.image) if sample else None
    return _rendered("review", sample=sample, picture=shown, number=number, num_matching=num_matching)


def problem_view(text: object) -> str:
    """What is wrong and what to do, instead of a tab's content."""
    return f'<div class="board-problem">{escape(str(text))}</div>'
