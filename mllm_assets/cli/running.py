"""`run`: makes a recipe, a dataset or an asset, and what it needs, through Dagster."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_assets.cli.options import Verbs, announce_home
from mllm_assets.errors import MllmAssetsError, RecipeError
from mllm_assets.layout import Layout

if TYPE_CHECKING:
    from mllm_assets.components.instance.launch import Outcome
    from mllm_assets.components.instance.run_plan import Request


def add_commands(verbs: Verbs) -> None:
    run = verbs.add_parser("run", help="make a recipe, a dataset or an asset, and what it needs")
    run.add_argument(
        "names",
        nargs="+",
        metavar="RECIPE|DATASET|ASSET",
        help="for example emoji_sft, emoji, emoji_sft/eval_metrics, '*/sample_quality'; an asset that is named without "
        "a pattern is made again",
    )
    run.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="keys that override the recipe's")
    run.add_argument(
        "--only", action="store_true", help="nothing but what is named; of a recipe or dataset its own assets"
    )
    run.add_argument("--force", action="store_true", help="all of it again, also what is up to date; trains again")
    run.add_argument("--dry-run", action="store_true", help="only show what would run")
    run.set_defaults(run=_run)

    enable = verbs.add_parser("enable", help="switch on a recipe, dataset or model that is declared and off")
    enable.add_argument("name", metavar="RECIPE|DATASET|MODEL", help="for example gemma3_lora_sft, with all it needs")
    enable.set_defaults(run=_enable)


def _run(arguments: argparse.Namespace) -> int:
    from mllm_assets.components.instance.launch import run
    from mllm_assets.components.instance.location import module_of
    from mllm_assets.components.instance.run_plan import Request

    texts = [*arguments.names, *arguments.overrides]
    request = Request(
        names=[text for text in texts if "=" not in text],
        overrides=[text for text in texts if "=" in text],
        only=arguments.only,
        force=arguments.force,
    )
    if not request.names:
        raise RecipeError(f"{' '.join(texts)}: name the recipe too, such as mllm-assets run RECIPE {texts[0]}.")
    layout = Layout.from_environment()
    project = Path.cwd()
    module_of(project)  # where there is no project, no folder for its history is made
    announce_home(layout)
    outcome = run(request, project, layout, dry_run=arguments.dry_run, notify=_notify)
    return _ended(outcome, request, layout, dry_run=arguments.dry_run)


def _enable(arguments: argparse.Namespace) -> int:
    from mllm_assets.project.enable import enable

    print(enable(Path.cwd(), arguments.name))
    return 0


def _notify(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _ended(outcome: "Outcome", request: "Request", layout: Layout, *, dry_run: bool) -> int:
    if outcome.was_cancelled:
        command = " ".join(["mllm-assets run", *map(shlex.quote, [*request.names, *request.overrides])])
        _notify(f"\nstopped; what was finished is kept. To go on from there: {command}")
        return 130
    if outcome.problems:
        print("\nnot made:", *(f"  {text}" for text in outcome.problems), sep="\n", file=sys.stderr)
        if command := _what_was_trained(request, layout):
            _notify(f"\nWhat was trained is kept: {command}")
        return 1
    if dry_run:
        _notify("Nothing was run (--dry-run).")
        return 0
    if not outcome.was_made:
        _notify("Everything is up to date; --force makes it again.")
    for name in dict.fromkeys(name.partition("/")[0] for name in outcome.named):
        print(_figures(name, request.overrides, layout) or "", end="")
    return 0


def _what_was_trained(request: "Request", layout: Layout) -> str:
    """How to look at the run of a recipe that ended at a gate or later; "" where nothing was trained."""
    from mllm_assets.evaluation.run_lookup import find_run
    from mllm_assets.project.read import plain_name

    for name in request.names:
        recipe = plain_name(layout, name).partition("/")[0]
        with suppress(MllmAssetsError):
            find_run(layout, recipe, request.overrides)
            return " ".join(["mllm-assets summary", *map(shlex.quote, [recipe, *request.overrides])])
    return ""


def _figures(owner: str, overrides: Sequence[str], layout: Layout) -> str | None:
    """The results of a recipe that was trained; where a dataset's samples are to be looked at."""
    from mllm_assets.cli.summary import summarise
    from mllm_assets.data.curate.sample_page import REPORT

    if (page := layout.data / owner / REPORT).is_file():
        return f"\nAll samples, to look at in a browser: {layout.relative(page)}\n"
    if not (layout.outputs / owner).is_dir():
        return None
    try:
        return f"{summarise(layout, owner, overrides)}\n"
    except MllmAssetsError:
        return None
