"""`mllm-assets`: what can be done without Dagster. One thin subcommand a verb; torch loads only where it is used."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mllm_assets.errors import MachineError, MllmAssetsError
from mllm_assets.layout import Layout
from mllm_assets.training.launch import WorkerCrashed

DEVICES = ("auto", "cuda", "mps", "cpu")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Exit code 2 says that something is for the user to mend; the message says what."""
    try:
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments) or 0
    except MllmAssetsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkerCrashed as crash:
        print(f"error: {crash}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, and the same command goes on from it", file=sys.stderr)
        return 130


def _device_from_environment() -> str:
    device = os.environ.get("MLLM_ASSETS_DEVICE", "auto")
    if device not in DEVICES:
        raise MachineError(
            f"MLLM_ASSETS_DEVICE is {device!r}: expected one of {', '.join(DEVICES)}. Correct or unset it."
        )
    return device


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mllm-assets", description="Fine-tune vision-language models.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train a LLaMA-Factory recipe on a ShareGPT directory, without Dagster")
    train.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys that win over the file's")
    train.add_argument("--device", choices=DEVICES, default=_device_from_environment())
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
    inspect.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys that win over the file's")
    inspect.add_argument("--row", type=int, default=0, help="training row, from 0; negative ones count from the end")
    inspect.add_argument("--device", choices=DEVICES, default=_device_from_environment())
    inspect.set_defaults(run=_inspect)

    generate = verbs.add_parser("generate", help="a model's answer to an image and a prompt")
    generate.add_argument("--model", type=Path, required=True, help="model, run, checkpoint or release directory")
    generate.add_argument("--image", type=Path, action="append", default=[], help="may be given several times")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--system", help="system message")
    generate.add_argument("--template", help="turn format it was trained in, where its family has several")
    generate.add_argument("--max-new-tokens", type=int, default=100)
    generate.add_argument("--do-sample", action="store_true", help="sample in place of greedy decoding")
    generate.add_argument("--temperature", type=float, default=1.0)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--device", choices=DEVICES, default=_device_from_environment())
    generate.add_argument("--json", action="store_true", help="print one JSON object")
    generate.set_defaults(run=_generate)

    summary = verbs.add_parser("summary", help="where a recipe's results are and what they say")
    summary.add_argument("recipe", help="recipe name, for example emoji_sft")
    summary.set_defaults(run=_summary)

    quality = verbs.add_parser("quality", help="what the quality database says of a dataset's samples")
    quality.add_argument("view", choices=("worst", "leaks", "duplicates", "captions", "rejects"))
    quality.add_argument("--dataset", required=True)
    quality.add_argument("--limit", type=_at_least_one, default=20, help="rows to show, 20 by default")
    quality.add_argument("--json", action="store_true", help="print a JSON list")
    quality.set_defaults(run=_quality)

    add = verbs.add_parser("add-dataset", help="declare a folder of images, tables or tars as a dataset")
    add.add_argument("folder", type=Path, metavar="DIR")
    add.add_argument("--name", help="of the dataset; by default the folder's")
    add.set_defaults(run=_add_dataset)

    check_data = verbs.add_parser("check-data", help="validate a LLaMA-Factory directory (exit code 2 if it is wrong)")
    check_data.add_argument("folder", type=Path, metavar="DIR")
    check_data.add_argument("--limit", type=_at_least_one, default=20, help="problems to show of an entry")
    check_data.set_defaults(run=_check_data)

    slots = verbs.add_parser("slots", help="pool slots that killed runs still hold")
    slots.add_argument("action", choices=("free",))
    slots.set_defaults(run=_free_slots)

    check = verbs.add_parser("check-graph", help="name every recipe and dataset that cannot be built (exit code 2)")
    check.set_defaults(run=_check_graph)
    return parser


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
    from mllm_assets.training.inspecting import inspect
    from mllm_assets.training.protocol import Reporter
    from mllm_assets.training.recipe import load_recipe
    from mllm_assets.training.runs import find_model_dir

    root = Layout.from_environment().root
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    lines = inspect(
        recipe,
        find_model_dir(recipe, root),
        root / recipe.spec.dataset_dir,
        root / recipe.output_dir / "inspect",
        Reporter(),
        row=arguments.row,
        device=arguments.device,
        colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR"),  # https://no-color.org
    )
    for line in lines:
        print(line)
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from mllm_assets.inference.generate import generate

    answer = generate(
        arguments.model,
        arguments.image,
        arguments.prompt,
        system=arguments.system,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=arguments.do_sample,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        device=arguments.device,
        template=arguments.template,
    )
    if arguments.json:
        print(json.dumps({"text": answer.text, "time_s": answer.time_s, "num_tokens": answer.num_tokens}))
    else:
        print(answer.text)
        print(f"Time taken: {answer.time_s:.2f} seconds")
    return 0


def _summary(arguments: argparse.Namespace) -> int:
    from mllm_assets.summary import summarise

    print(summarise(Layout.from_environment(), arguments.recipe))
    return 0


def _quality(arguments: argparse.Namespace) -> int:
    from mllm_assets.quality.queries import ask, print_rows

    rows = ask(Layout.from_environment(), arguments.view, arguments.dataset, arguments.limit)
    print_rows(rows, view=arguments.view, dataset=arguments.dataset, as_json=arguments.json)
    return 0


def _add_dataset(arguments: argparse.Namespace) -> int:
    from mllm_assets.data.scaffold import add_dataset

    made = add_dataset(arguments.folder, Path.cwd(), Layout.from_environment().root, name=arguments.name)
    print(f"{made.num_samples} samples; wrote {made.path}")
    for reason, count in made.defects.items():
        print(f"  {count} will be rejected: {reason}")
    print("Read it (prompts, answer, split), then: dg check yaml")
    print(f"dagster asset materialize -m {made.definitions} --select '+key:\"{made.name}/dataset_info\"'")
    return 0


def _check_data(arguments: argparse.Namespace) -> int:
    from mllm_assets.data.check_directory import check_directory

    wrong = False
    for report in check_directory(arguments.folder):
        wrong |= bool(report.problems)
        state = f"{len(report.problems)} problems" if report.problems else "fine"
        print(f"{report.name}: {report.num_rows} rows, {report.num_images} images: {state}")
        for problem in report.problems[: arguments.limit]:
            print(f"  {problem}")
        if len(report.problems) > arguments.limit:
            print(f"  and {len(report.problems) - arguments.limit} more (--limit shows them)")
    return 2 if wrong else 0


def _free_slots(arguments: argparse.Namespace) -> int:
    if not os.environ.get("DAGSTER_HOME"):
        raise MachineError(
            "DAGSTER_HOME is not set, so no run outlives its command. Set it as `make dev` does: "
            "export DAGSTER_HOME=$PWD/.dagster_home"
        )
    from dagster import DagsterInstance

    from mllm_assets.components.slots import end_dead_runs

    with DagsterInstance.get() as instance:
        dead = end_dead_runs(instance)
    for run_id in dead:
        print(f"run {run_id}: its process is gone; ended, and its slots are free")
    return 0


def _check_graph(arguments: argparse.Namespace) -> int:
    from mllm_assets.components.reporting import unreadable_assets
    from mllm_assets.definitions import defs

    unreadable = unreadable_assets(defs())
    for key, message in unreadable.items():
        print(f"{key}: {message}", file=sys.stderr)
    return 2 if unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
