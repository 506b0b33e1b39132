"""The board: samples, runs, answers, a conversation and new runs of a project, on a page of this machine."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware

from mllm_assets.artifacts import is_complete
from mllm_assets.cli.board.approve_tab import approve_tab
from mllm_assets.cli.board.evaluate_tab import evaluate_tab
from mllm_assets.cli.board.launches import Launches
from mllm_assets.cli.board.results_tabs import gallery_tab, runs_tab
from mllm_assets.cli.board.review_tab import review_tab
from mllm_assets.cli.board.samples_tab import samples_tab
from mllm_assets.cli.board.start_tab import start_tab
from mllm_assets.cli.board.written_pages import WrittenPages
from mllm_assets.errors import ModelError
from mllm_assets.inference.addresses import is_loopback
from mllm_assets.inference.answerer import Answerer, free_memory
from mllm_assets.inference.chat_page import MAX_MODELS, MAX_WAITING, Reset, add_chat, gr, show
from mllm_assets.inference.generate import open_model
from mllm_assets.layout import Layout
from mllm_assets.pages import page_template
from mllm_assets.releases.find import find_named_model
from mllm_assets.training.runs.history import known_runs

MAX_LISTED = 200  # models to choose from


@dataclass(frozen=True, slots=True)
class Models:
    """The models of a project by name; those that were asked last stay loaded, as many as a page shows."""

    layout: Layout
    device: str
    loaded: dict[str, Answerer]

    def names(self) -> list[str]:
        """Releases, finished runs, base models, and the checkpoints of all runs."""
        releases = sorted(
            f"{path.parent.name}@{path.name}"
            for path in self.layout.root.glob("releases/*/v*")
            if not path.is_symlink() and is_complete(path)
        )
        known = known_runs(self.layout)
        runs = [f"outputs/{run.key}" for run in known if run.state == "finished"]
        checkpoints = [
            f"outputs/{run.key}/{path.name}"
            for run in known
            for path in sorted(run.directory.glob("checkpoint-*"), key=os.path.getmtime, reverse=True)
            if is_complete(path)
        ]
        bases = sorted(f"pretrained/{path.parent.name}" for path in self.layout.pretrains.glob("[!.]*/config.json"))
        return [*releases, *runs, *bases, *checkpoints][:MAX_LISTED]

    def open(self, name: str) -> Answerer:
        """Load a model of the list.

        Raises:
            ModelError: It is not one of them, or holds no usable model.
        """
        if name not in self.names():
            raise ModelError(f"{name!r} is not a model of this project. Choose one of the list.")
        if name not in self.loaded:
            while len(self.loaded) >= MAX_MODELS:
                del self.loaded[next(iter(self.loaded))]
            self.loaded[name] = open_model(find_named_model(name, self.layout), device=self.device)
        return self.loaded[name]

    def unload(self) -> str:
        """Forget the loaded models, so that a training has their memory; returns what was done."""
        count = len(self.loaded)
        self.loaded.clear()
        free_memory()
        return f"{count} model{'s' * (count != 1)} unloaded. The next question loads one again."


def build_board(layout: Layout, launches: Launches, *, device: str = "auto", is_local: bool = True) -> Any:
    """Build the page; `is_local` where only this machine reaches it."""
    with gr.Blocks(analytics_enabled=False, title=f"{layout.root.name}: board") as page:
        gr.HTML(page_template("mllm_assets.cli.board", "style.html.jinja").render(name=layout.root.name))
        with gr.Tabs():
            with gr.Tab("Samples", id="samples"):
                samples_tab(page, layout, links_pages=is_local)
            with gr.Tab("Review", id="review") as tab:
                review_tab(page, tab, layout)
            with gr.Tab("Runs", id="runs"):
                runs_tab(page, layout)
            with gr.Tab("Gallery", id="gallery") as tab:
                gallery_tab(tab, layout)
            with gr.Tab("Approve", id="approve") as tab:
                approve_tab(tab, layout)
            models = Models(layout, device, {})
            with gr.Tab("Evaluate", id="evaluate") as tab:
                evaluate_tab(tab, layout, launches, models.names, device=device, links_pages=is_local)
            with gr.Tab("Chat", id="chat") as tab:
                _chat_tab(tab, models)
            with gr.Tab("Start", id="start") as tab:
                start_tab(page, tab, layout, launches)
    return page.queue(max_size=MAX_WAITING)


def _chat_tab(tab: Any, models: Models) -> None:
    chosen = gr.Dropdown(
        models.names(), value=models.names()[:1], multiselect=True, max_choices=MAX_MODELS,
        label="Models, one to three; each is loaded when it is first asked",
    )  # fmt: skip
    labels = (models.names()[:1] or [""]) + [""] * (MAX_MODELS - 1)
    with gr.Row():
        unload = gr.Button("Unload models", size="sm", scale=0, min_width=160)
        told = gr.Markdown("")
    # after the question that is being answered
    unload.click(models.unload, None, told, concurrency_limit=1, concurrency_id="model")
    _, _, reset = add_chat(chosen, labels, models.open, has_reference=False)
    tab.select(lambda: gr.update(choices=models.names()), None, chosen, show_progress="hidden")
    chosen.change(_relabelled(reset), [chosen], reset.outputs, show_progress="hidden")


def _relabelled(reset: Reset) -> Callable[[list[str]], list[Any]]:
    """A new conversation with columns of the chosen models."""
    num_columns = len(reset.outputs) - 3

    def relabel(names: list[str]) -> list[Any]:
        padded = [*names, *[""] * num_columns][:num_columns]
        columns = [gr.update(label=name or "model", visible=bool(name), value=[]) for name in padded]
        return ["", [], gr.update(), *columns]

    return relabel


def board(layout: Layout, project: Path, *, host: str, port: int, password: str | None, device: str = "auto") -> None:
    """Show the board until the process is stopped; runs that it started are stopped with it."""
    launches = Launches(project, layout.root)
    try:
        page = build_board(layout, launches, device=device, is_local=is_loopback(host))
        show(page, host=host, port=port, password=password, local=[Middleware(WrittenPages, layout=layout)])
    finally:
        launches.stop_all()
