"""The results of a recipe: `summary`, `evaluate`, `compare`, and its releases: `releases list`, `show`, `rollback`."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_assets.cli.options import (
    Verbs,
    add_device_option,
    add_sampling_options,
    at_least_one,
    given_sampling,
    help_without_verb,
)
from mllm_assets.errors import RecipeError
from mllm_assets.layout import Layout
from mllm_assets.training.runs.models import HOW_TO_NAME

if TYPE_CHECKING:
    from mllm_assets.worker.tasks import Accelerator, EvaluationSettings


def add_commands(verbs: Verbs) -> None:
    summary = verbs.add_parser("summary", help="a recipe's results, and where they are")
    summary.add_argument("recipe", metavar="RECIPE", help="its run as written; or another run, <recipe>/<fingerprint>")
    summary.add_argument("overrides", nargs="*", metavar="key=value", help="values of the run instead of the recipe's")
    summary.set_defaults(run=_summary)

    _add_evaluate(verbs)

    compare = verbs.add_parser("compare", help="a page with the answers of two evaluated runs to the same samples")
    compare.add_argument(
        "runs",
        nargs=2,
        metavar="RUN",
        help="run directory, <recipe>/<fingerprint>, or a recipe's name for its newest evaluated run",
    )
    compare.add_argument("--output", type=Path, default=Path("comparison.html"), help="comparison.html by default")
    compare.set_defaults(run=_compare)

    releases = verbs.add_parser("releases", help="the released models of a recipe: list, show, rollback")
    actions = releases.add_subparsers(metavar="ACTION")
    help_without_verb(releases)

    listed = actions.add_parser("list", help="versions, which is current, and whether each is undamaged")
    listed.add_argument("recipe", nargs="?", metavar="RECIPE", help="all recipes by default")
    listed.add_argument("--sizes-only", action="store_true", help="do not read the weights: compare sizes only")
    listed.add_argument("--json", action="store_true", help="print one JSON array")
    listed.set_defaults(run=_list)
    listed.epilog = "example: mllm-assets releases list emoji_sft"

    show = actions.add_parser("show", help="what a release was made from, its gates and its metrics")
    show.add_argument("recipe", metavar="RECIPE")
    show.add_argument("version", nargs="?", metavar="VERSION", help="for example v2; the current one by default")
    show.add_argument("--json", action="store_true", help="print its manifest and metrics as one JSON object")
    show.set_defaults(run=_show)
    show.epilog = "example: mllm-assets releases show emoji_sft v1"

    rollback = actions.add_parser("rollback", help="make another version the current one; nothing is deleted")
    rollback.add_argument("recipe", metavar="RECIPE")
    rollback.add_argument(
        "version", nargs="?", metavar="VERSION", help="such as v1; by default the one before the current"
    )
    rollback.set_defaults(run=_roll_back)
    rollback.epilog = "example: mllm-assets releases rollback emoji_sft"


def _add_evaluate(verbs: Verbs) -> None:
    evaluate = verbs.add_parser(
        "evaluate", help="metrics of a run's checkpoints over steps; with --on those of any model on any entry"
    )
    evaluate.add_argument(
        "of",
        metavar="RUN|MODEL",
        help="run directory, <recipe>/<fingerprint>, or a recipe's name for its newest finished run; "
        f"with --on {HOW_TO_NAME}",
    )
    evaluate.add_argument(
        "--on",
        action="append",
        default=[],
        metavar="ENTRY",
        help="an entry of dataset_info.json, may be given several times; without it the recipe's eval_dataset",
    )
    evaluate.add_argument("--checkpoint", help="a step; by default all. With --on name it: emoji_sft@checkpoint-40")
    evaluate.add_argument("--max-samples", type=at_least_one, help="of each entry, spread over it; all by default")
    evaluate.add_argument("--max-new-tokens", type=at_least_one, default=64)
    add_sampling_options(evaluate)
    evaluate.add_argument("--batch-size", type=at_least_one, help="rows at once; 16, and 64 where a GPU holds them")
    add_device_option(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(run=_evaluate)


def _summary(arguments: argparse.Namespace) -> int:
    from mllm_assets.cli.summary import summarise

    print(summarise(Layout.from_environment(), arguments.recipe, arguments.overrides))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from mllm_assets.worker.tasks import Accelerator, EvaluationSettings

    layout, accelerator = Layout.from_environment(), Accelerator(device=arguments.device)
    settings = EvaluationSettings(
        max_samples=arguments.max_samples,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        **given_sampling(arguments),
    )
    if arguments.on:
        return _evaluate_model(arguments, layout, accelerator, settings)

    from mllm_assets.evaluation.checkpoint_metrics import PLOT_FILE, describe, evaluate_checkpoints, find_run

    run_dir, wanted = find_run(layout, arguments.of), arguments.checkpoint or "all"
    result = evaluate_checkpoints(layout, run_dir, wanted, accelerator=accelerator, settings=settings)
    print(json.dumps(result.to_dict(), indent=2) if arguments.json else describe(result))
    if len(result.steps) > 1:
        print(f"drawn in {layout.relative(run_dir / PLOT_FILE)}", file=sys.stderr)
    return 0


def _evaluate_model(
    arguments: argparse.Namespace, layout: Layout, accelerator: "Accelerator", settings: "EvaluationSettings"
) -> int:
    from mllm_assets.artifacts import is_sound
    from mllm_assets.evaluation.one_model import describe, evaluation_of_model, scores_of
    from mllm_assets.releases.find import find_named_model
    from mllm_assets.worker.launch import run_worker

    if arguments.checkpoint:
        raise RecipeError(
            "--checkpoint is of a run's own evaluation. With --on name the checkpoint as the model: "
            f"{arguments.of}@checkpoint-{arguments.checkpoint.removeprefix('checkpoint-')}"
        )
    entries = list(dict.fromkeys(name for text in arguments.on for name in text.split(",") if name))
    model = find_named_model(arguments.of, layout)
    task = evaluation_of_model(layout, model, entries, settings=settings, accelerator=accelerator)
    if not is_sound(task.directory):  # asked before with the same settings it is read
        run_worker(task)
    result = scores_of(task, layout.root)
    print(json.dumps(result.to_dict(), indent=2) if arguments.json else describe(result))
    print(f"answers, to open in a browser: {layout.relative(result.gallery)}", file=sys.stderr)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from mllm_assets.evaluation.comparison import compare

    page = compare(
        Layout.from_environment(),
        arguments.runs,
        arguments.output,
        notify=lambda text: print(f"note: {text}", file=sys.stderr),
    )
    print(f"wrote {page}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from mllm_assets.releases.report import LIST_COLUMNS, list_facts, list_rows, nothing_released
    from mllm_assets.tables import print_table

    layout = Layout.from_environment()
    facts = list_facts(layout, arguments.recipe, deep=not arguments.sizes_only)
    if arguments.json:
        print(json.dumps(facts, indent=1))
    elif facts:
        print_table(LIST_COLUMNS, list_rows(facts), numbers=["MiB"], prose=["where"])
    else:
        print(nothing_released(layout))
    return 2 if any(release["damage"] for release in facts) else 0


def _show(arguments: argparse.Namespace) -> int:
    from mllm_assets.releases.report import show_facts, show_text

    facts = show_facts(Layout.from_environment(), arguments.recipe, arguments.version)
    print(json.dumps(facts, indent=1) if arguments.json else show_text(facts))
    return 2 if facts["damage"] else 0


def _roll_back(arguments: argparse.Namespace) -> int:
    from mllm_assets.releases.versions import roll_back
    from mllm_assets.store.mirror import Mirror
    from mllm_assets.store.objects import Store

    layout = Layout.from_environment()
    before, after = roll_back(layout, arguments.recipe, arguments.version)
    if url := os.environ.get("MLLM_ASSETS_STORE"):
        Mirror(Store(url, layout.root), layout).push_current(arguments.recipe)  # or the next run would undo it
    if before == after:
        print(f"{arguments.recipe}: {after.version} is already the current release.")
        return 0
    current = Path("releases", arguments.recipe, "current")
    print(
        f"{arguments.recipe}: {after.version} is the current release, {before.version} was.\n{current} and the gate "
        f"no_regression_against_release follow it. To go back: mllm-assets releases rollback {arguments.recipe} "
        f"{before.version}"
    )
    return 0
