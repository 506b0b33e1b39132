"""The board's tab Samples: any dataset's samples, filtered and searched, a page at a time."""

from collections.abc import Callable
from typing import Any

from mllm_assets.cli.board.views import problem_view, samples_view
from mllm_assets.cli.board.written_pages import samples_address
from mllm_assets.data.quality.browse import FLAGGED, ORDERS, SPLITS, SampleQuery, assessed_datasets, browse, choices
from mllm_assets.errors import MllmAssetsError
from mllm_assets.inference.chat_page import gr
from mllm_assets.layout import Layout

ALL = "all"
NOTHING = "No dataset was assessed yet. Make one: mllm-assets run emoji"


def samples_tab(page: Any, layout: Layout, *, links_pages: bool) -> None:
    """Add the tab's components; `links_pages` where the board serves the pages that assets wrote."""
    with gr.Row():
        dataset = gr.Dropdown(label="Dataset", min_width=140)
        text = gr.Textbox(
            label="Search", placeholder="text, label, place, id or answer", max_lines=1, min_width=200, scale=2
        )
        order = gr.Dropdown(list(ORDERS), value=next(iter(ORDERS)), label="Order", min_width=170)
    with gr.Row():
        split = gr.Dropdown([ALL, *SPLITS], value=ALL, label="Split", min_width=110)
        flag = gr.Dropdown([ALL], value=ALL, label="Flag or reason", min_width=150)
        recipe = gr.Dropdown([""], value="", label="Answers of", min_width=150)
        answers = gr.Dropdown([ALL, "right", "wrong"], value=ALL, label="Answered", min_width=110)
    with gr.Row():
        found = gr.Markdown("")
        back = gr.Button("← Previous", size="sm", scale=0, min_width=110)
        number = gr.Number(
            1, label="Page", show_label=False, container=False, precision=0, minimum=1, scale=0, min_width=80
        )
        on = gr.Button("Next →", size="sm", scale=0, min_width=110)
    grid = gr.HTML()
    filters: list[Any] = [dataset, text, split, flag, recipe, answers, order]

    def show(*values: Any) -> tuple[str, int, str]:
        text, number, samples = _page_of(layout, *values)
        address = samples_address(layout, values[0]) if text and links_pages else None
        return f"{text} · [as a page of its own]({address})" if address else text, number, samples

    def begin() -> list[Any]:
        try:
            names = assessed_datasets(layout)
        except MllmAssetsError as error:
            return [gr.update(), "", 1, problem_view(error)]
        first = names[0] if names else None
        return [gr.update(choices=names, value=first), *show(first, "", ALL, ALL, "", ALL, next(iter(ORDERS)), 1)]

    def of_dataset(dataset: str | None) -> list[Any]:
        """What it can be filtered by; the newest answers of its first recipe are shown."""
        if not dataset:
            return [gr.update()] * 2
        found = choices(layout, dataset)
        return [
            gr.update(choices=[ALL, FLAGGED, *found.flags], value=ALL),
            gr.update(choices=["", *found.recipes], value=next(iter(found.recipes), "")),
        ]

    shown = [found, number, grid]
    page.load(begin, None, [dataset, *shown], show_progress="hidden")
    dataset.change(of_dataset, dataset, [flag, recipe], show_progress="hidden")
    when_filtered([part.change for part in filters], filters, lambda *values: show(*values, 1), shown)
    for button, step in ((back, -1), (on, 1)):
        button.click(
            lambda *v, step=step: show(*v[:-1], v[-1] + step), [*filters, number], shown, show_progress="hidden"
        )
    number.submit(show, [*filters, number], shown, show_progress="hidden")


def when_filtered(events: list[Any], filters: list[Any], show: Callable[..., Any], outputs: list[Any]) -> None:
    """Show what is found by the filters' newest values: of several listeners an older answer could come last."""
    gr.on(events, show, filters, outputs, show_progress="hidden", trigger_mode="always_last")


def _page_of(layout: Layout, *values: Any) -> tuple[str, int, str]:
    """What was found, the page's number and its samples, by the values of all filters and the number."""
    dataset, text, split, flag, recipe, answers, order, page = values
    if not dataset:
        return "", 1, problem_view(NOTHING)
    try:
        query = SampleQuery(
            dataset=dataset,
            text=(text or "")[:200],
            split="" if split == ALL else split,
            flag="" if flag == ALL else flag,
            recipe=recipe or "",
            answers=answers if answers in ("right", "wrong") else "",
            order=order,
            page=max(1, min(int(page or 1), 10**6)),
        )
        seen = browse(layout, query)
    except MllmAssetsError as error:
        return "", 1, problem_view(error)
    at = min(query.page, seen.num_pages)
    if at != query.page:
        return _page_of(layout, *values[:-1], at)
    number = f"{seen.num_matching:,} sample{'s' * (seen.num_matching != 1)}"
    return f"**{number}**, page {at} of {seen.num_pages}", at, samples_view(seen)
