"""The board's tab Start: a recipe from a few choices, what it needs and what the model will see, and its run."""

import base64
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from PIL import Image

from mllm_assets.cli.board.launches import PROCESSES, Launches
from mllm_assets.cli.board.views import problem_view
from mllm_assets.data.sharegpt.entries import read_dataset_info
from mllm_assets.errors import MllmAssetsError, RecipeError
from mllm_assets.families.family import TEMPLATES
from mllm_assets.inference.chat_page import gr
from mllm_assets.layout import Layout
from mllm_assets.pages import page_template
from mllm_assets.recipe.draft import METHODS, RecipeDraft, read_draft, renamed, write_draft
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.loop.inspecting import look, row_facts, stretches
from mllm_assets.training.loop.reporting import trainable_lines

NUM_SHOWN_ROWS = 3
MAX_LOOKED_AT = 200  # rows that the estimate reads
SEEN_PX = 320
REFRESH_S = 1


def start_tab(page: Any, tab: Any, layout: Layout, launches: Launches) -> None:
    """Add the tab's components."""
    with gr.Row():
        with gr.Column(scale=3):
            parts = _choices_of(layout)
        with gr.Column(scale=4):
            title = "The recipe, as its file will be; edit it freely, a choice on the left writes it anew"
            text = gr.Code(label=title, language="yaml", lines=20)
            with gr.Row():
                check = gr.Button("Estimate and show rows", scale=3)
                write = gr.Button("Write the recipe", scale=2)
                start = gr.Button("Write and start", variant="primary", scale=2)
    message = gr.HTML()
    gr.Markdown("### Runs that this page started")
    with gr.Row():
        run = gr.Dropdown(label="Run", scale=3)
        recipe = gr.Dropdown(label="Or start a recipe of configs/", scale=2)
        overrides = gr.Textbox(label="with other values", placeholder="max_steps=60 seed=1", scale=2)
        processes = _processes()
        start_other = gr.Button("Start", scale=0, min_width=90)
        copy = gr.Button("Edit a copy", scale=0, min_width=165)
        stop = gr.Button("Stop", variant="stop", scale=0, min_width=90)
    state = gr.Markdown("")
    log = gr.Textbox(label="Log", lines=12, max_lines=12, interactive=False, autoscroll=True, elem_classes="board-log")
    timer = gr.Timer(REFRESH_S)

    fields, name = list(parts.values()), parts["name"]
    page.load(lambda *values: _draft(parts, values), fields, text, show_progress="hidden")
    others = [part.change for part in fields if part is not name]
    gr.on(others, lambda *values: _draft(parts, values), fields, text, show_progress="hidden")
    name.change(_renamed, [text, name], text, show_progress="hidden")  # which keeps what was edited
    copy.click(told(lambda stem: _copied(layout, stem), num_kept=2), recipe, [name, text, message])
    check.click(lambda name, text: _looked(layout, name, text), [name, text], message, concurrency_limit=1)
    write.click(lambda name, text: _written(layout, name, text), [name, text], message)

    def begin(recipe: str | None, overrides: str, processes: float) -> list[Any]:
        launch = launches.start(recipe or "", overrides.split(), num_processes=max(1, int(processes or 1)))
        return [gr.update(choices=[one.title for one in launches.all], value=launch.title), _started(launch.title)]

    def write_and_begin(name: str, text: str, processes: float) -> list[Any]:
        path = write_draft(layout.root, name, text)
        return begin(path.stem, "", processes)

    shown = [run, message]
    start.click(told(write_and_begin), [name, text, processes], shown)
    start_other.click(told(begin), [recipe, overrides, processes], shown)
    stop.click(told(lambda title: [gr.update(), stopped(launches, title)]), run, shown)

    def follow(title: str | None) -> list[Any]:
        shown = launches.find(title)
        titles = list(dict.fromkeys(one.title for one in launches.all))
        if shown is None:
            return [gr.update(choices=titles), "Nothing was started from this page yet.", ""]
        return [gr.update(choices=titles), f"**{shown.state}**", "\n".join(shown.lines)]

    timer.tick(follow, run, [run, state, log], show_progress="hidden")
    configs = [lambda: gr.update(choices=sorted(path.stem for path in layout.configs.glob("*.yaml")))]
    gr.on([tab.select, start.click, write.click], configs[0], None, recipe, show_progress="hidden")


def _started(title: str) -> str:
    return f'<div class="board-done">{title.partition(" ")[0]} was started; its curve is in Runs.</div>'


def _processes() -> Any:
    told_so = os.environ.get(PROCESSES, "")
    return gr.Number(
        int(told_so) if told_so.isdecimal() else 1, label="Processes, one a GPU", precision=0, minimum=1, min_width=90
    )


def _choices_of(layout: Layout) -> dict[str, Any]:
    """The components of a draft's fields."""
    entries, models = known_entries(layout), _models(layout)
    defaults = RecipeDraft(name="my_recipe", model="", template="", entry="")
    evaluation = next((entry for entry in entries if entry.endswith("_val")), "")
    train = next((entry for entry in entries if entry.endswith("_train")), next(iter(entries), None))
    parts: dict[str, Any] = {"name": gr.Textbox(defaults.name, label="Name")}
    with gr.Row():
        parts["entry"] = gr.Dropdown(entries, value=[train] if train else [], label="Trains on", multiselect=True)
        parts["eval_entry"] = gr.Dropdown(["", *entries], value=evaluation, label="Evaluated on")
    with gr.Row():
        parts["model"] = gr.Dropdown(models, value=next(iter(models), None), label="Starts from")
        parts["template"] = gr.Dropdown(list(TEMPLATES), value=next(iter(TEMPLATES)), label="Turn format")
    parts["method"] = gr.Dropdown(list(METHODS), value=defaults.method, label="What trains")
    with gr.Row():
        parts["max_steps"] = gr.Number(defaults.max_steps, label="Steps", precision=0, minimum=1, min_width=90)
        parts["epochs"] = gr.Number(defaults.epochs, label="or epochs", minimum=0, min_width=90)
        for key, title in (("batch_size", "Batch size"), ("accumulation", "Accumulation")):
            parts[key] = gr.Number(getattr(defaults, key), label=title, precision=0, minimum=1, min_width=90)
    with gr.Row():
        parts["learning_rate"] = gr.Number(defaults.learning_rate, label="Learning rate", minimum=0, min_width=90)
        for key, title in (("lora_rank", "LoRA rank"), ("cutoff_len", "Max. tokens"), ("seed", "Seed")):
            parts[key] = gr.Number(getattr(defaults, key), label=title, precision=0, minimum=0, min_width=90)
    parts["bf16"] = gr.Checkbox(defaults.bf16, label="bf16")
    return parts


def known_entries(layout: Layout) -> list[str]:
    """The entries of `data/dataset_info.json`, by name; none where it cannot be read."""
    try:
        return sorted(read_dataset_info(layout.data))
    except MllmAssetsError:
        return []


def _models(layout: Layout) -> list[str]:
    """Base models, and the latest models of other recipes: a next stage starts from one."""
    found = [*layout.pretrains.glob("[!.]*/config.json"), *layout.outputs.glob("*/latest/model/config.json")]
    return sorted((layout.relative(path.parent) for path in found), key=lambda name: (name.startswith("outputs"), name))


def _draft(parts: dict[str, Any], values: Sequence[Any]) -> str:
    given = dict(zip(parts, values, strict=True))
    try:
        given = {key: "" if value is None else value for key, value in given.items()}
        given["entry"] = ",".join(given["entry"])
        return RecipeDraft(**given).to_yaml()
    except (MllmAssetsError, TypeError, ValueError) as error:
        return f"# {error}\n"


def _renamed(text: str | None, name: str | None) -> Any:
    try:
        return renamed(text or "", name or "")
    except MllmAssetsError:  # a name without a letter, which is refused when the recipe is written
        return gr.update()


def _copied(layout: Layout, stem: str | None) -> list[Any]:
    """The text of a recipe of `configs/`, under a name that is free."""
    stems = {path.stem: path for path in layout.configs.glob("*.yaml")}
    if stem not in stems:
        raise RecipeError("Choose a recipe of configs/ first.")
    name = next(name for number in itertools.count(2) if (name := f"{stem}_{number}") not in stems)
    text = renamed(stems[stem].read_text(encoding="utf-8"), name)
    done = f"{name} is a copy of {stem}: edit it above, write it, start it."
    return [name, text, f'<div class="board-done">{escape(done)}</div>']


def told(action: Any, num_kept: int = 1) -> Any:
    """An action whose refusal is shown where its result would be; what is before that stays as it is."""

    def tell(*values: Any) -> list[Any]:
        try:
            return action(*values)
        except MllmAssetsError as error:
            return [*[gr.update()] * num_kept, problem_view(error)]

    return tell


def stopped(launches: Launches, title: str | None) -> str:
    """Stop what this page started; returns what is said about it."""
    if not title:
        raise RecipeError("Choose a run that this page started.")
    return f'<div class="board-done">{launches.stop(title)}</div>'


def _written(layout: Layout, name: str, text: str | None) -> str:
    try:
        path = write_draft(layout.root, name, text)
    except MllmAssetsError as error:
        return problem_view(error)
    return f'<div class="board-done">wrote configs/{path.name}; reload the definitions to see it in the graph</div>'


def _looked(layout: Layout, name: str, text: str | None) -> str:
    """The memory that a recipe needs, what trains, and its first rows as the model will see them."""
    try:
        recipe = read_draft(name, text)
        seen = look(recipe, layout.root, max_rows=MAX_LOOKED_AT)
    except MllmAssetsError as error:
        return problem_view(error)
    rows = seen.setup.inputs.train_rows[:NUM_SHOWN_ROWS]
    processor = seen.setup.inputs.processor
    return page_template("mllm_assets.cli.board", "look.html.jinja").render(
        memory=seen.memory,
        notes=seen.notes,
        trains="\n".join(trainable_lines(seen.setup.shape.table, seen.setup.shape.num_params)),
        rows=[
            {
                "id": row.id, "facts": row_facts(row), "parts": list(_parts(row, processor)),
                "pictures": [_as_uri(image) for image in seen.images(row)],
            }
            for row in rows
        ],
    )  # fmt: skip


def _parts(row: EncodedRow, processor: Any) -> Iterator[tuple[str, bool]]:
    """A row's text in stretches, and whether each is trained on; an image's tokens are one stretch."""
    decode = processor.tokenizer.decode
    for visual, trains, tokens in stretches(row, processor):
        yield (decode(tokens) if visual is None else f"{decode([visual])} × {len(tokens)}"), trains


def _as_uri(image: Image.Image) -> str:
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((SEEN_PX, SEEN_PX))
    small.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
