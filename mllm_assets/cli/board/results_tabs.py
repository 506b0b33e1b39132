"""The board's tabs Runs and Gallery: any runs over each other, and what any two models answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from mllm_assets.cli.board.views import curves_view, pairs_view, problem_view, table_view, titles_of
from mllm_assets.components.instance.judged import judged_gates
from mllm_assets.errors import DataError, MllmAssetsError
from mllm_assets.evaluation.side_by_side import (
    CHANGES,
    ORDERS,
    PAGE_SIZE,
    Model,
    evaluated,
    pairs_of,
    table_of,
)
from mllm_assets.inference.chat_page import gr
from mllm_assets.layout import Layout
from mllm_assets.training.runs.history import KnownRun, known_runs

MAX_LISTED = 200  # runs to choose from, the newest
MAX_SHOWN = 12  # runs in one table
REFRESH_S = 3


def _choices(runs: Sequence[KnownRun]) -> list[tuple[str, str]]:
    runs = runs[:MAX_LISTED]
    named = zip(titles_of(runs), runs, strict=True)
    return [(f"{title}{'' if run.state == 'finished' else f' ({run.state})'}", run.key) for title, run in named]


def _gates(runs: Sequence[KnownRun]) -> Mapping[str, Mapping[str, str]]:
    try:
        return judged_gates(sorted({run.directory.parent.name for run in runs}))
    except MllmAssetsError:
        return {}  # the table has no gates then; `mllm-assets doctor` says why the history does not open


def runs_tab(page: Any, layout: Layout) -> None:
    """Add the tab's components; what is shown is read again every few seconds, the list of runs too."""
    with gr.Row():
        chosen = gr.Dropdown(label="Runs", multiselect=True, max_choices=MAX_SHOWN, scale=4)
        smooth = gr.Slider(0, 0.95, value=0.6, step=0.05, label="Smoothing", scale=1, min_width=160)
        logarithmic = gr.Checkbox(label="logarithmic", scale=0, min_width=150)
    curves, table = gr.HTML(), gr.HTML()
    timer = gr.Timer(REFRESH_S)

    def runs_of(keys: Sequence[str] | None) -> list[KnownRun]:
        by_key = {run.key: run for run in known_runs(layout)}
        return [by_key[key] for key in (keys or ())[:MAX_SHOWN] if key in by_key]

    def draw(keys: Sequence[str] | None, smooth: float, logarithmic: bool) -> str:
        runs = runs_of(keys)
        return curves_view(runs, titles_of(runs), smooth=min(max(smooth, 0.0), 0.99), logarithmic=bool(logarithmic))

    def tabulate(keys: Sequence[str] | None) -> str:
        runs = runs_of(keys)
        try:
            return table_view(runs, table_of(layout, runs, _gates(runs)) if runs else [], titles_of(runs))
        except MllmAssetsError as error:
            return problem_view(error)

    def begin() -> list[Any]:
        runs = known_runs(layout)
        keys = [run.key for run in runs[:3]]
        return [gr.update(choices=_choices(runs), value=keys), draw(keys, 0.6, False), tabulate(keys)]

    def refresh(keys: Sequence[str] | None, smooth: float, logarithmic: bool) -> list[Any]:
        return [gr.update(choices=_choices(known_runs(layout))), draw(keys, smooth, logarithmic), tabulate(keys)]

    how: list[Any] = [chosen, smooth, logarithmic]
    page.load(begin, None, [chosen, curves, table], show_progress="hidden")
    gr.on([part.change for part in how], draw, how, curves, show_progress="hidden", trigger_mode="always_last")
    chosen.change(tabulate, chosen, table, show_progress="hidden", trigger_mode="always_last")
    timer.tick(refresh, how, [chosen, curves, table], show_progress="hidden")


def gallery_tab(tab: Any, layout: Layout) -> None:
    """Add the tab's components."""
    with gr.Row():
        first = gr.Dropdown(label="First")
        second = gr.Dropdown(label="Second")
    with gr.Row():
        change = gr.Dropdown([(text, key) for key, text in CHANGES.items()], value="", label="Which samples")
        order = gr.Dropdown(list(ORDERS), value=ORDERS[0], label="Order")
        number = gr.Number(1, label="Page", precision=0, minimum=1, scale=0, min_width=80)
    found, grid = gr.Markdown(""), gr.HTML()
    parts: list[Any] = [first, second, change, order, number]

    def models() -> list[tuple[str, str]]:
        runs = evaluated(layout, known_runs(layout)[:MAX_LISTED])
        named = list(zip(titles_of(runs), runs, strict=True))
        return [(f"{title}: {model}", f"{run.key}:{model}") for title, run in named for model in ("tuned", "base")]

    def show(first: str | None, second: str | None, change: str, order: str, page: float) -> list[Any]:
        if not first or not second:
            return ["", problem_view("No run was evaluated yet. Train one: mllm-assets run emoji_sft")]
        try:
            sides = [_side(layout, first), _side(layout, second)]
            pairs = pairs_of(layout, sides[0], sides[1])
        except MllmAssetsError as error:
            return ["", problem_view(error)]
        matching, right = pairs.found(change, order), pairs.num_right
        start = PAGE_SIZE * (max(1, int(page or 1)) - 1)
        num_pages = max(1, -(-len(matching) // PAGE_SIZE))
        text = f"**{len(matching):,} of {len(pairs):,} samples**, {num_pages} page{'s' * (num_pages != 1)}. Right: "
        names = [f"{title}: {model}" for title, (_, model) in zip(titles_of([s[0] for s in sides]), sides, strict=True)]
        text += f"first {right[0]}, second {right[1]}."
        return [text, pairs_view(pairs.at(matching[start : start + PAGE_SIZE]), (names[0], names[1]))]

    def begin(first: str | None, second: str | None, *how: Any) -> list[Any]:
        known = models()
        keys = [key for _, key in known]
        one = first if first in keys else next((key for key in keys if key.endswith(":base")), None)
        other = second if second in keys else next((key for key in keys if key.endswith(":tuned")), None)
        updates = [gr.update(choices=known, value=one), gr.update(choices=known, value=other)]
        return [*updates, *show(one, other, *how)]

    tab.select(begin, parts, [first, second, found, grid], show_progress="hidden")
    gr.on([part.change for part in parts], show, parts, [found, grid], show_progress="hidden")


def _side(layout: Layout, name: str) -> tuple[KnownRun, Model]:
    """The run and model of `<recipe>/<fingerprint>:tuned`.

    Raises:
        DataError: There is no such run.
    """
    key, _, model = name.rpartition(":")
    for run in known_runs(layout):
        if run.key == key:
            return run, "base" if model == "base" else "tuned"
    raise DataError(f"There is no run {key} any more. Choose another one.")
