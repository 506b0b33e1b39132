"""What trains: `train` and `inspect`."""

import argparse
import os
import sys
from pathlib import Path

from mllm_assets.cli.options import Verbs, add_device_option
from mllm_assets.layout import Layout


def add_commands(verbs: Verbs) -> None:
    train = verbs.add_parser("train", help="train a LLaMA-Factory recipe on a ShareGPT directory, without Dagster")
    train.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    train.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="recipe keys that win over the file's"
    )
    add_device_option(train)
    train.add_argument("--num-processes", type=int, default=os.environ.get("MLLM_ASSETS_NUM_PROCESSES", "1"))
    train.add_argument("--force", action="store_true", help="train again although this very run is finished")
    train.add_argument("--no-feature-cache", action="store_true", help="compute the frozen parts anew in every step")
    train.add_argument(
        "--regroup-micro-batches",
        action="store_true",
        help="batch size x accumulation as the largest micro-batch that fits; changes the mean of means a little",
    )
    train.set_defaults(run=_train)

    inspect = verbs.add_parser("inspect", help="what the model will see of a recipe's rows, and what trains")
    inspect.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    inspect.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="recipe keys that win over the file's"
    )
    inspect.add_argument("--row", type=int, default=0, help="training row, from 0; negative ones count from the end")
    add_device_option(inspect)
    inspect.set_defaults(run=_inspect)


def _train(arguments: argparse.Namespace) -> int:
    from mllm_assets.training.local import train

    accelerator = {"device": arguments.device, "num_processes": arguments.num_processes, "num_threads": None}
    run = train(
        arguments.recipe,
        arguments.overrides,
        Layout.from_environment(),
        accelerator,
        warn=lambda text: print(f"warning: {text}", file=sys.stderr),
        force=arguments.force,
        feature_cache=not arguments.no_feature_cache,
        regroup=arguments.regroup_micro_batches,
    )
    print(run.describe())
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from mllm_assets.data.dataset_info import load_entry
    from mllm_assets.training.model_directory import find_model_dir
    from mllm_assets.training.protocol import Reporter
    from mllm_assets.training.recipe import load_recipe

    root = Layout.from_environment().root
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    model_dir, data_dir = find_model_dir(recipe, root), root / recipe.spec.dataset_dir
    for entry in recipe.spec.train_entries:
        load_entry(data_dir, entry)  # what is missing is said before what takes seconds to import

    from mllm_assets.training.inspecting import inspect

    lines = inspect(
        recipe,
        model_dir,
        data_dir,
        root / recipe.spec.output_dir / "inspect",
        Reporter(),
        row=arguments.row,
        device=arguments.device,
        colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR"),  # https://no-color.org
    )
    for line in lines:
        print(line)
    return 0
