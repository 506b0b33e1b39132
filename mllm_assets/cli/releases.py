"""The released models: `releases list`, `releases show`, `releases rollback`."""

import argparse
import json
import os
from pathlib import Path

from mllm_assets.cli.options import Verbs, help_without_verb
from mllm_assets.layout import Layout


def add_commands(verbs: Verbs) -> None:
    releases = verbs.add_parser("releases", help="the released models of a recipe: list, show, rollback")
    actions = releases.add_subparsers(metavar="ACTION")
    help_without_verb(releases)

    listed = actions.add_parser("list", help="versions, which is current, and whether each is as it was released")
    listed.add_argument("recipe", nargs="?", help="recipe name; all recipes by default")
    listed.add_argument("--sizes-only", action="store_true", help="do not read the weights: compare sizes only")
    listed.add_argument("--json", action="store_true", help="print one JSON array")
    listed.set_defaults(run=_list)

    show = actions.add_parser("show", help="what a release was made from, its gates and its figures")
    show.add_argument("recipe")
    show.add_argument("version", nargs="?", help="for example v2; the current one by default")
    show.add_argument("--json", action="store_true", help="print its manifest and metrics as one JSON object")
    show.set_defaults(run=_show)

    rollback = actions.add_parser("rollback", help="make another version the current one; nothing is deleted")
    rollback.add_argument("recipe")
    rollback.add_argument("version", nargs="?", help="for example v1; by default the one before the current one")
    rollback.set_defaults(run=_roll_back)


def _list(arguments: argparse.Namespace) -> int:
    from mllm_assets.evaluation.release_report import list_facts, list_text, nothing_released

    layout = Layout.from_environment()
    facts = list_facts(layout, arguments.recipe, deep=not arguments.sizes_only)
    if arguments.json:
        print(json.dumps(facts, indent=1))
    else:
        print(list_text(facts) if facts else nothing_released(layout))
    return 2 if any(release["damage"] for release in facts) else 0


def _show(arguments: argparse.Namespace) -> int:
    from mllm_assets.evaluation.release_report import show_facts, show_text

    facts = show_facts(Layout.from_environment(), arguments.recipe, arguments.version)
    print(json.dumps(facts, indent=1) if arguments.json else show_text(facts))
    return 2 if facts["damage"] else 0


def _roll_back(arguments: argparse.Namespace) -> int:
    from mllm_assets.evaluation.release_versions import roll_back
    from mllm_assets.mirror import Mirror
    from mllm_assets.store import Store

    layout = Layout.from_environment()
    before, after = roll_back(layout, arguments.recipe, arguments.version)
    if url := os.environ.get("MLLM_ASSETS_STORE"):
        Mirror(Store(url, layout.root), layout).push_current(arguments.recipe)  # else the next run would undo it
    if before == after:
        print(f"{arguments.recipe}: {after.version} is the current release already.")
        return 0
    current = Path("releases", arguments.recipe, "current")
    print(
        f"{arguments.recipe}: {after.version} is the current release, {before.version} was.\n{current} and the gate "
        f"no_regression_against_release follow it. Back again: mllm-assets releases rollback {arguments.recipe} "
        f"{before.version}"
    )
    return 0
