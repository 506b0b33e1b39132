"""Training: `train` and `inspect`."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_assets.cli.options import Verbs, add_device_option, at_least_one
from mllm_assets.layout import Layout
from mllm_assets.project.read import recipe_file, require_known_recipe
from mllm_assets.worker.run_settings import AnswerSample, RunSettings

if TYPE_CHECKING:
    from mllm_assets.recipe.load import Recipe


def add_commands(verbs: Verbs) -> None:
    train = verbs.add_parser("train", help="train a LLaMA-Factory recipe on a ShareGPT directory, without Dagster")
    _add_recipe(train)
    add_device_option(train)
    train.add_argument("--num-processes", type=int, default=os.environ.get("MLLM_ASSETS_NUM_PROCESSES", "1"))
    train.add_argument("--force", action="store_true", help="train again although this very run is finished")
    train.add_argument("--no-feature-cache", action="store_true", help="compute the frozen parts again in every step")
    train.add_argument(
        "--regroup-micro-batches",
        action="store_true",
        help="batch size x accumulation as the largest micro-batch that fits; changes the mean of means a little",
    )
    train.add_argument(
        "--metric-samples",
        type=at_least_one,
        help="rows of eval_dataset that are asked about, where metric_for_best_model is of answers; 64 by default",
    )
    train.set_defaults(run=_train)

    inspect = verbs.add_parser("inspect", help="what the model will see of a recipe's rows, and what trains")
    _add_recipe(inspect)
    inspect.add_argument("--row", type=int, default=0, help="training row, from 0; negative ones count from the end")
    add_device_option(inspect)
    inspect.set_defaults(run=_inspect)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="its file, or its name: configs/emoji_sft.yaml or emoji_sft")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="keys that override the file's")


def _load(arguments: argparse.Namespace, layout: Layout) -> "Recipe":
    from mllm_assets.recipe.load import load_recipe

    given = Path(arguments.recipe)
    path = given if given.exists() else recipe_file(layout, str(given)) or given
    if not path.exists() and path.name == arguments.recipe and not path.suffix:
        require_known_recipe(layout, arguments.recipe)
    return load_recipe(path, arguments.overrides)


def run_settings(arguments: argparse.Namespace) -> RunSettings:
    """What the options say beside the recipe."""
    answers = AnswerSample(max_samples=arguments.metric_samples) if arguments.metric_samples else AnswerSample()
    return RunSettings(regroup=arguments.regroup_micro_batches, answers=answers)


def _train(arguments: argparse.Namespace) -> int:
    from mllm_assets.training.loop.local import train
    from mllm_assets.worker.tasks import Accelerator

    layout = Layout.from_environment()
    run = train(
        _load(arguments, layout),
        layout,
        Accelerator(device=arguments.device, num_processes=arguments.num_processes),
        warn=lambda text: print(f"warning: {text}", file=sys.stderr),
        force=arguments.force,
        feature_cache=not arguments.no_feature_cache,
        settings=run_settings(arguments),
    )
    print(run.describe())
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from mllm_assets.data.sharegpt.entries import load_entry
    from mllm_assets.training.runs.models import find_model_dir

    layout = Layout.from_environment()
    root, recipe = layout.root, _load(arguments, layout)
    for entry in recipe.spec.train_entries:
        load_entry(root / recipe.spec.dataset_dir, entry)  # what is missing is reported before the slow imports
    find_model_dir(recipe, root)

    from mllm_assets.training.loop.inspecting import inspect

    lines = inspect(
        recipe,
        root,
        row=arguments.row,
        device=arguments.device,
        colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR"),  # https://no-color.org
    )
    for line in lines:
        print(line)
    return 0
