"""`approve`: a person's yes or no to a model, which a release with `approval: required` waits for."""

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from mllm_assets.cli.options import Verbs, announce_home
from mllm_assets.errors import RecipeError
from mllm_assets.layout import Layout

if TYPE_CHECKING:
    from mllm_assets.releases.candidate import Considered


def add_commands(verbs: Verbs) -> None:
    approve = verbs.add_parser("approve", help="your yes or no to a model, which its release can be made to wait for")
    approve.add_argument("of", metavar="RECIPE", help="its last evaluated model; or a run, <recipe>/<fingerprint>")
    approve.add_argument("--refuse", action="store_true", help="say no; needs --why")
    approve.add_argument("--why", default="", metavar="TEXT", help="kept with the decision, and told in the card")
    approve.add_argument("--who", metavar="NAME", help="who decides; by default the name of the user")
    approve.add_argument("--yes", action="store_true", help="do not ask again")
    approve.set_defaults(run=_approve)


def _approve(arguments: argparse.Namespace) -> int:
    from mllm_assets.decisions import user_name
    from mllm_assets.releases.approvals import Decision
    from mllm_assets.releases.candidate import consider

    layout = Layout.from_environment()
    considered = consider(layout, arguments.of)
    decision = Decision(
        subject=considered.subject,
        approved=not arguments.refuse,
        who=arguments.who or user_name(),
        why=arguments.why,
    )
    if not arguments.yes and not sys.stdin.isatty():
        raise RecipeError("There is no terminal to ask on. Give --yes to decide without being asked.")

    from mllm_assets.components.instance.approving import gates_of, record  # with Dagster, which takes seconds

    announce_home(layout)
    gates = gates_of(considered)
    decision = replace(decision, seen=considered.seen(gates))
    _show(considered, gates)
    if not arguments.yes and not _asked(decision.approved, considered.recipe):
        print("Nothing was decided.", file=sys.stderr)
        return 1
    record(layout, considered, decision)
    print(f"{considered.recipe}: {decision}")
    if decision.approved:
        print(f"To release it: mllm-assets run {considered.recipe}/released_model --only (or its sensor does)")
    return 0


def _asked(approves: bool, recipe: str) -> bool:
    try:
        answer = input(f"{'Approve' if approves else 'Refuse'} this model of {recipe}? [y/N] ")
    except EOFError:  # Ctrl-D
        return False
    return answer.strip().lower() in ("y", "yes")


def _show(considered: "Considered", gates: dict[str, str]) -> None:
    from mllm_assets.tables import print_table

    print(f"{considered.recipe}: {considered.run}{f', released as {considered.version}' * bool(considered.version)}")
    rows = [(one.entry, one.metric, one.base, one.tuned, one.gain) for one in considered.figures]
    print_table(("entry", "metric", "base", "tuned", "gain (95 % interval)"), rows, numbers=("base", "tuned"))
    for gate, text in gates.items():
        print(f"  {gate}: {text}")
    if not gates:
        print("  gates: not judged in this history; the release judges them")
    if considered.gallery:
        print(f"  answers, to look at in a browser: {considered.gallery}")
    for decision in considered.decisions:
        print(f"  {decision}")
