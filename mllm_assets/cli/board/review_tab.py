"""The board's tab Review: a dataset's samples one by one, and a person's decision about each, by button or key."""

from typing import Any

from mllm_assets.cli.board.samples_tab import when_filtered
from mllm_assets.cli.board.views import problem_view, review_view
from mllm_assets.components.instance.reviewing import record
from mllm_assets.data.curate.corrections import DROP, KEEP, RELABEL, UNDO, Action
from mllm_assets.data.curate.review import proposed, review_page, source_samples
from mllm_assets.data.quality.browse import PAGE_SIZE, SPLITS, SampleQuery, assessed_datasets, choices
from mllm_assets.decisions import MAX_WHO_CHARS, MAX_WHY_CHARS, user_name
from mllm_assets.errors import DataError, MllmAssetsError
from mllm_assets.inference.chat_page import gr
from mllm_assets.layout import Layout

ALL = "all"
MAX_CHOICES = 50  # of more different answers none is offered
NOTHING = "No dataset was assessed yet. Make one: mllm-assets run emoji"
# k, d, u and the arrows press the button of that name while the tab is shown and nothing is typed; r goes to the answer
KEYS = """() => document.addEventListener("keydown", event => {
  const names = {k: "keep", d: "drop", u: "undo", ArrowLeft: "previous", ArrowRight: "next"};
  const typing = event.target.closest("input, textarea, select, [contenteditable], [role=tab]");
  const tab = document.querySelector("#review-next");
  if (typing || !tab || !tab.offsetParent || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "r") { document.querySelector("#review-answer input")?.focus(); event.preventDefault(); }
  const button = document.querySelector(`#review-${names[event.key]}`);
  if (button) { button.click(); event.preventDefault(); }
})"""


def review_tab(page: Any, tab: Any, layout: Layout) -> None:
    """Add the tab's components."""
    with gr.Row():
        dataset = gr.Dropdown(label="Dataset to review", min_width=140)
        text = gr.Textbox(label="Find", placeholder="text, label, place or id", max_lines=1, min_width=160)
        split = gr.Dropdown([ALL, *SPLITS], value=ALL, label="In split", min_width=110)
        recipe = gr.Dropdown([""], value="", label="Model of recipe", min_width=150)
        answers = gr.Dropdown([ALL, "right", "wrong"], value=ALL, label="It answered", min_width=110)
    shown = gr.HTML()
    with gr.Row():
        answer = gr.Dropdown([], label="New answer (r)", allow_custom_value=True, elem_id="review-answer", scale=2)
        why = gr.Textbox(label="Why, if you like", max_length=MAX_WHY_CHARS, max_lines=1, scale=2)
        who = gr.Textbox(user_name(), label="Who reviews", max_length=MAX_WHO_CHARS, max_lines=1, scale=1)
    labels = {"previous": "← Previous", KEEP: "Keep (k)", RELABEL: "Relabel", DROP: "Drop (d)", UNDO: "Undo (u)"}
    variants: dict[str, Any] = {KEEP: "primary", RELABEL: "primary", DROP: "stop"}
    with gr.Row():
        buttons = {
            name: gr.Button(label, variant=variants.get(name, "secondary"), elem_id=f"review-{name}", min_width=100)
            for name, label in {**labels, "next": "Next →"}.items()
        }
    at, seen = gr.State(0), gr.State("")  # the sample's number in what is found, and its id: nothing else is decided
    filters: list[Any] = [dataset, text, split, recipe, answers]
    outputs = [shown, at, seen, answer]

    def show(*values: Any) -> list[Any]:
        return _shown(layout, *values)

    def begin() -> list[Any]:
        try:
            names = assessed_datasets(layout)
        except MllmAssetsError as error:
            return [gr.update(), problem_view(error), 0, "", gr.update()]
        first = names[0] if names else None
        return [gr.update(choices=names, value=first), *show(first, "", ALL, "", ALL, 0)]

    def decide(action: Action, new: str, why: str, who: str, sample: str, *values: Any) -> list[Any]:
        try:
            if not sample:
                raise DataError("No sample is shown. Take a filter away.")
            new = (new or "") if action == RELABEL else ""
            made = proposed(layout, values[0], action, [sample], new=new, who=who or "", why=why or "")
            record(layout, values[0], made)
        except MllmAssetsError as error:
            return [problem_view(error), *[gr.update()] * 3, gr.update()]
        return [*show(*values[:-1], values[-1] + (action != UNDO)), ""]

    tab.select(begin, None, [dataset, *outputs], show_progress="hidden")
    page.load(None, None, None, js=KEYS)
    dataset.change(lambda name: _choices(layout, name), dataset, [recipe, answer], show_progress="hidden")
    # what a person chooses: the answer to what `begin` sets came after a first decision, and led back to sample 1
    chosen = [dataset.input, text.input, split.input, recipe.change, answers.input]
    when_filtered(chosen, filters, lambda *values: show(*values, 0), outputs)
    for name, step in (("previous", -1), ("next", 1)):
        buttons[name].click(
            lambda *v, step=step: show(*v[:-1], v[-1] + step), [*filters, at], outputs, show_progress="hidden"
        )
    for action in (KEEP, RELABEL, DROP, UNDO):
        buttons[action].click(
            lambda *v, action=action: decide(action, *v), [answer, why, who, seen, *filters, at], [*outputs, why]
        )


def _choices(layout: Layout, dataset: str | None) -> list[Any]:
    """The recipes whose models were asked, and the answers that its samples have where they are few."""
    if not dataset:
        return [gr.update()] * 2
    try:
        known = sorted({one.answer for one in source_samples(layout, dataset) if one.answer})
    except MllmAssetsError:  # which the view says
        known = []
    return [
        gr.update(choices=["", *choices(layout, dataset).recipes], value=""),
        gr.update(choices=known if len(known) <= MAX_CHOICES else []),
    ]


def _shown(layout: Layout, *values: Any) -> list[Any]:
    """The sample at a place in what the filters find, the place, the sample's id, and its answer to be changed."""
    dataset, text, split, recipe, answers, at = values
    if not dataset:
        return [problem_view(NOTHING), 0, "", ""]
    at = max(0, int(at or 0))
    try:
        query = SampleQuery(
            dataset=dataset,
            text=(text or "")[:200],
            split="" if split == ALL else split,
            recipe=recipe or "",
            answers=answers if answers in ("right", "wrong") else "",
            order="highest loss first" if recipe else "most suspicious first",
            page=at // PAGE_SIZE + 1,
        )
        found = review_page(layout, query)
        if found.num_matching and at >= found.num_matching:
            return _shown(layout, *values[:-1], found.num_matching - 1)
    except MllmAssetsError as error:
        return [problem_view(error), 0, "", ""]
    if not found.samples:
        return [review_view(None, 0, 0), 0, "", ""]
    one = found.samples[at % PAGE_SIZE]
    return [review_view(one, at + 1, found.num_matching), at, one.seen.sample_id, one.answer]
