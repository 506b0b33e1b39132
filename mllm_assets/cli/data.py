"""What is known of datasets, and new ones: `quality`, `add-dataset`, `check-data`."""

import argparse
from pathlib import Path

from mllm_assets.cli.options import Verbs, at_least_one
from mllm_assets.errors import RecipeError
from mllm_assets.layout import Layout


def add_commands(verbs: Verbs) -> None:
    quality = verbs.add_parser("quality", help="what the quality database says of a dataset's samples")
    views = ("worst", "leaks", "duplicates", "captions", "rejects", "hardest")
    quality.add_argument("view", choices=views, help="hardest: what a recipe's model finds least likely; with --recipe")
    of = quality.add_mutually_exclusive_group(required=True)
    of.add_argument("--dataset")
    of.add_argument("--recipe", help="for `hardest`")
    quality.add_argument("--limit", type=at_least_one, default=20, help="rows to show, 20 by default")
    quality.add_argument("--json", action="store_true", help="print a JSON list")
    quality.set_defaults(run=_quality)

    add = verbs.add_parser("add-dataset", help="declare a folder of images, tables or tars as a dataset")
    add.add_argument("folder", type=Path, metavar="DIR")
    add.add_argument("--name", help="of the dataset; by default the folder's")
    add.set_defaults(run=_add_dataset)

    check_data = verbs.add_parser("check-data", help="validate a LLaMA-Factory directory (exit code 2 if it is wrong)")
    check_data.add_argument("folder", type=Path, metavar="DIR")
    check_data.add_argument("--limit", type=at_least_one, default=20, help="problems to show of an entry")
    check_data.set_defaults(run=_check_data)


def _quality(arguments: argparse.Namespace) -> int:
    from mllm_assets.quality.queries import ask, print_rows

    name = arguments.recipe if arguments.view == "hardest" else arguments.dataset
    if name is None:
        wanted = "--recipe" if arguments.view == "hardest" else "--dataset"
        raise RecipeError(f"quality {arguments.view} needs {wanted} NAME. Give it in place of the other one.")
    rows = ask(Layout.from_environment(), arguments.view, name, arguments.limit)
    print_rows(rows, view=arguments.view, name=name, as_json=arguments.json)
    return 0


def _add_dataset(arguments: argparse.Namespace) -> int:
    from mllm_assets.data.scaffold import add_dataset
    from mllm_assets.project.read import materialize_command

    made = add_dataset(arguments.folder, Path.cwd(), Layout.from_environment().root, name=arguments.name)
    print(f"{made.num_samples} samples; wrote {made.path}")
    if made.name != (given := arguments.name or arguments.folder.resolve().name):
        print(f"note: {given!r} is called {made.name} here: keys hold a to z, 0 to 9 and _ only")
    found = made.preview
    looked_at = f" of the {found.num_checked} looked at" if found.num_checked < made.num_samples else ""
    for reason, count in found.reject_reasons.items():
        print(f"  {count}{looked_at} will be rejected: {reason} (first: {found.first_rejected[reason]})")
    num_repeats = found.num_checked - found.num_usable - sum(found.reject_reasons.values())
    if num_repeats:
        print(f"  {num_repeats}{looked_at} repeat another's images and texts, and stay unused")
    train, val = made.entries
    print("Read it (prompts, answer, split), then:")
    print("  mllm-assets check-graph")
    print(f"  {materialize_command(f'{made.name}/dataset_info')}")
    print(f"  mllm-assets quality rejects --dataset {made.name}")
    print("  mllm-assets check-data data")
    print(f"and put `dataset: {train}` and `eval_dataset: {val}` into a recipe in configs/.")
    return 0


def _check_data(arguments: argparse.Namespace) -> int:
    from mllm_assets.data.check_directory import check_directory

    wrong = False
    for report in check_directory(arguments.folder):
        wrong |= bool(report.problems)
        found = {"problems": report.problems, "warnings": report.warnings}
        state = (
            ", ".join(f"{len(texts)} {kind if len(texts) > 1 else kind[:-1]}" for kind, texts in found.items() if texts)
            or "fine"
        )
        print(f"{report.name}: {report.num_rows} rows, {report.num_images} images: {state}")
        for texts in found.values():
            for text in texts[: arguments.limit]:
                print(f"  {text}")
            if len(texts) > arguments.limit:
                print(f"  and {len(texts) - arguments.limit} more (--limit shows them)")
    return 2 if wrong else 0
