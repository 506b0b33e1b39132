"""What came of a recipe: `summary`, `evaluate`, `compare`."""

import argparse
import sys
from pathlib import Path

from mllm_assets.cli.options import Verbs, add_device_option, at_least_one
from mllm_assets.layout import Layout


def add_commands(verbs: Verbs) -> None:
    summary = verbs.add_parser("summary", help="where a recipe's results are and what they say")
    summary.add_argument("recipe", help="recipe name, for example emoji_sft")
    summary.set_defaults(run=_summary)

    evaluate = verbs.add_parser("evaluate", help="metrics of a run's checkpoints over steps, and the best of them")
    evaluate.add_argument(
        "of",
        metavar="RUN",
        help="run directory, <recipe>/<fingerprint>, or a recipe's name for its newest finished run",
    )
    evaluate.add_argument("--checkpoint", default="all", help="a step; by default all")
    evaluate.add_argument("--max-samples", type=at_least_one, help="of each evaluation entry; all by default")
    evaluate.add_argument("--max-new-tokens", type=at_least_one, default=64)
    evaluate.add_argument("--batch-size", type=at_least_one, default=16)
    add_device_option(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(run=_evaluate)

    compare = verbs.add_parser("compare", help="a page that shows what two evaluated runs say of the same samples")
    compare.add_argument(
        "runs",
        nargs=2,
        metavar="RUN",
        help="run directory, <recipe>/<fingerprint>, or a recipe's name for its newest evaluated run",
    )
    compare.add_argument("--output", type=Path, default=Path("comparison.html"), help="comparison.html by default")
    compare.set_defaults(run=_compare)


def _summary(arguments: argparse.Namespace) -> int:
    from mllm_assets.summary import summarise

    print(summarise(Layout.from_environment(), arguments.recipe))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from mllm_assets.evaluation.over_steps import PLOT_FILE, describe, evaluate_checkpoints, find_run, to_json

    layout = Layout.from_environment()
    run_dir = find_run(layout, arguments.of)
    result = evaluate_checkpoints(
        layout,
        run_dir,
        arguments.checkpoint,
        accelerator={"device": arguments.device, "num_threads": None},
        max_samples=arguments.max_samples,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
    )
    print(to_json(result) if arguments.json else describe(result))
    if len(result.steps) > 1:
        print(f"drawn in {layout.relative(run_dir / PLOT_FILE)}", file=sys.stderr)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from mllm_assets.evaluation.comparison import compare

    page = compare(
        Layout.from_environment(),
        arguments.runs,
        arguments.output,
        say=lambda text: print(f"note: {text}", file=sys.stderr),
    )
    print(f"wrote {page}")
    return 0
