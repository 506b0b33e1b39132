"""The board's tab Approve: the figures of a recipe's last evaluated model, and a person's yes or no to it."""

from typing import Any

from mllm_assets.cli.board.views import considered_view, problem_view
from mllm_assets.components.instance.approving import gates_of, record
from mllm_assets.decisions import MAX_WHO_CHARS, MAX_WHY_CHARS, user_name
from mllm_assets.errors import DataError, MllmAssetsError
from mllm_assets.evaluation.run_lookup import evaluated_runs
from mllm_assets.inference.chat_page import gr
from mllm_assets.layout import Layout
from mllm_assets.releases.approvals import Decision
from mllm_assets.releases.candidate import consider


def approve_tab(tab: Any, layout: Layout) -> None:
    """Add the tab's components."""
    recipe = gr.Dropdown(label="Recipe")
    shown = gr.HTML()
    with gr.Row():
        who = gr.Textbox(user_name(), label="Who decides", max_length=MAX_WHO_CHARS, scale=1)
        why = gr.Textbox(label="Why (a refusal needs it)", max_length=MAX_WHY_CHARS, scale=3)
        approve = gr.Button("Approve", variant="primary", scale=0, min_width=110)
        refuse = gr.Button("Refuse", variant="stop", scale=0, min_width=110)
    subject = gr.State(None)  # what was shown: a model that was evaluated meanwhile is not decided about unseen

    def show(name: str | None) -> list[Any]:
        if not name:
            return [problem_view("No run was evaluated yet. Train one: mllm-assets run emoji_sft"), None]
        try:
            considered = consider(layout, name)
            return [considered_view(considered, gates_of(considered)), considered.subject]
        except MllmAssetsError as error:
            return [problem_view(error), None]

    def begin(name: str | None) -> list[Any]:
        known = _evaluated_recipes(layout)
        chosen = name if name in known else next(iter(known), None)
        return [gr.update(choices=known, value=chosen), *show(chosen)]

    def decide(name: str | None, seen: Any, who: str, why: str, *, approved: bool) -> list[Any]:
        try:
            if not name or seen is None:
                raise DataError("Choose a recipe that was evaluated.")
            considered = consider(layout, name)
            if considered.subject != seen:
                raise DataError(f"{name} was evaluated again meanwhile. Choose it again and look at the new figures.")
            seen_figures = considered.seen(gates_of(considered))
            decision = Decision(subject=seen, approved=approved, who=who or "", why=why or "", seen=seen_figures)
            record(layout, considered, decision)
        except MllmAssetsError as error:
            return [problem_view(error), seen]
        return show(name)

    tab.select(begin, recipe, [recipe, shown, subject], show_progress="hidden")
    # not `change`: the answer to what `begin` sets came after a person's refusal, and took its message away
    recipe.input(show, recipe, [shown, subject], show_progress="hidden")
    asked: list[Any] = [recipe, subject, who, why]
    approve.click(lambda *values: decide(*values, approved=True), asked, [shown, subject])
    refuse.click(lambda *values: decide(*values, approved=False), asked, [shown, subject])


def _evaluated_recipes(layout: Layout) -> list[str]:
    names = sorted(path.parent.name for path in layout.outputs.glob("*/eval_metrics"))
    return [name for name in names if next(evaluated_runs(layout, name), None) is not None]
