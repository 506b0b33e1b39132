"""The board's tab Evaluate: any model of the project asked about any entry, and what it scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mllm_assets.cli.board.launches import Launches
from mllm_assets.cli.board.start_tab import known_entries, stopped, told
from mllm_assets.cli.board.views import problem_view, scored_view
from mllm_assets.cli.board.written_pages import find_page
from mllm_assets.errors import MllmAssetsError, RecipeError
from mllm_assets.evaluation.one_model import evaluation_of_model, scores_of
from mllm_assets.inference.addresses import PAGES
from mllm_assets.inference.chat_page import gr
from mllm_assets.layout import Layout
from mllm_assets.releases.find import find_named_model
from mllm_assets.worker.tasks import Accelerator, EvaluationSettings

REFRESH_S = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a person asked for."""

    model: str
    entries: tuple[str, ...]
    settings: EvaluationSettings
    title: str

    def options(self, device: str) -> list[str]:
        """As `mllm-assets evaluate` takes them."""
        settings = self.settings
        given = [f"--max-new-tokens={settings.max_new_tokens}", f"--device={device}"]
        if settings.max_samples:
            given.append(f"--max-samples={settings.max_samples}")
        if settings.do_sample:
            given += ["--do-sample", f"--temperature={settings.temperature}", f"--top-p={settings.top_p}"]
        return given


def evaluate_tab(
    tab: Any, layout: Layout, launches: Launches, models: Callable[[], list[str]], *, device: str, links_pages: bool
) -> None:
    """Add the tab's components; `links_pages` where the board serves the pages that were written."""
    with gr.Row():
        model = gr.Dropdown(label="Model to evaluate", scale=3)
        entries = gr.Dropdown(label="On", multiselect=True, scale=3)
        most = gr.Number(200, label="Samples each (0: all)", precision=0, minimum=0, min_width=120)
        tokens = gr.Number(64, label="Most new tokens", precision=0, minimum=1, min_width=100)
    with gr.Row():
        draws = gr.Checkbox(label="sample the answers", min_width=180)
        temperature = gr.Number(1.0, label="Temperature", minimum=0.01, min_width=100)
        top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p", min_width=160)
        start = gr.Button("Evaluate", variant="primary", scale=0, min_width=120)
        stop = gr.Button("Stop", variant="stop", scale=0, min_width=90)
    message, figures = gr.HTML(), gr.HTML()
    log = gr.Textbox(label="Log", lines=5, max_lines=5, interactive=False, autoscroll=True, elem_classes="board-log")
    asked, timer = gr.State(None), gr.Timer(REFRESH_S, active=False)

    def begin(model: str | None, chosen: Sequence[str]) -> list[Any]:
        names, known = models(), known_entries(layout)
        kept = [name for name in chosen or () if name in known]
        return [
            gr.update(choices=names, value=model if model in names else next(iter(names), None)),
            gr.update(choices=known, value=kept or [name for name in known if name.endswith("_val")][:1]),
        ]

    tab.select(begin, [model, entries], [model, entries], show_progress="hidden")
    how: list[Any] = [model, entries, most, tokens, draws, temperature, top_p]
    launch = told(lambda *values: _launched(launches, models(), device, *values), num_kept=3)
    start.click(launch, how, [asked, timer, figures, message])
    end = told(lambda one: [stopped(launches, one.title if one else None)], num_kept=0)
    stop.click(end, asked, [message])
    timer.tick(
        lambda one: _state(layout, launches, one, links_pages=links_pages),
        asked,
        [timer, log, message, figures],
        show_progress="hidden",
    )


def _launched(
    launches: Launches, known: Sequence[str], device: str, model: str | None, entries: Sequence[str], *how: Any
) -> list[Any]:
    if not model or model not in known or not entries:
        raise RecipeError("Choose a model and at least one entry.")
    num_samples, num_tokens, draws, temperature, top_p = how
    settings = EvaluationSettings(
        max_samples=int(num_samples or 0) or None, max_new_tokens=max(1, int(num_tokens or 64))
    )
    if draws:
        settings = replace(settings, do_sample=True, temperature=temperature or 0, top_p=top_p)
    one = Asked(model=model, entries=tuple(entries), settings=settings, title=f"{model} on {', '.join(entries)}")
    launches.evaluate(one.model, one.entries, one.options(device))
    return [one, gr.update(active=True), "", ""]


def _state(layout: Layout, launches: Launches, one: Asked | None, *, links_pages: bool) -> list[Any]:
    """Whether to look again, the log, what is said, and the figures."""
    found = launches.find(one.title) if one else None
    if one is None or found is None:
        return [gr.update(active=False), "", gr.update(), gr.update()]
    lines = "\n".join(found.lines)
    if found.is_running:
        return [gr.update(), lines, f'<div class="board-empty">{found.state}</div>', ""]
    if found.process.returncode != 0:
        return [gr.update(active=False), lines, problem_view(f"{found.state}; the log says why."), ""]
    return [gr.update(active=False), lines, *_figures(layout, one, links_pages=links_pages)]


def _figures(layout: Layout, one: Asked, *, links_pages: bool) -> list[Any]:
    """A link to the page of answers, and the scores: of a finished evaluation, which is read and not made."""
    try:
        found = find_named_model(one.model, layout)
        task = evaluation_of_model(layout, found, one.entries, settings=one.settings, accelerator=Accelerator())
        scored = scores_of(task, layout.root)
    except MllmAssetsError as error:
        return [problem_view(error), ""]
    page = layout.relative(scored.gallery)
    link = f'<a href="{PAGES}{page}" target="_blank">all answers as a page</a>' if links_pages else page
    return [f'<div class="board-done">{link if find_page(layout, page) else "done"}</div>', scored_view(scored)]
