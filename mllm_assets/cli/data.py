"""Datasets: `quality`, `add-dataset`, `check-data`."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_assets.cli.options import Verbs, at_least_one
from mllm_assets.errors import RecipeError
from mllm_assets.layout import Layout
from mllm_assets.progress import progress_to

if TYPE_CHECKING:
    from mllm_assets.data.curate.checks import EntryReport


def add_commands(verbs: Verbs) -> None:
    quality = verbs.add_parser("quality", help="a dataset's samples in the quality database")
    views = ("worst", "leaks", "duplicates", "captions", "rejects", "hardest")
    quality.add_argument("view", choices=views, help="hardest: highest loss under a recipe's model; with --recipe")
    of = quality.add_mutually_exclusive_group(required=True)
    of.add_argument("--dataset")
    of.add_argument("--recipe", help="for `hardest`")
    quality.add_argument("--limit", type=at_least_one, default=20, help="rows to show, 20 by default")
    quality.add_argument("--wide", action="store_true", help="all columns, ids and digests too")
    quality.add_argument("--json", action="store_true", help="print a JSON list, of all columns")
    quality.set_defaults(run=_quality)

    add = verbs.add_parser("add-dataset", help="declare a folder of images, tables or tars as a dataset")
    add.add_argument("folder", type=Path, metavar="DIR")
    add.add_argument("--name", help="of the dataset; by default the folder's")
    for role, what in (("image", "pictures"), ("question", "questions"), ("answer", "answers or captions"),
                       ("label", "classes"), ("messages", "conversations, several with commas")):  # fmt: skip
        add.add_argument(f"--{role}", metavar="COLUMN", help=f"the column of {what}, where several fit")
    add.add_argument("--file", help="the file of rows, where several fit")
    add.add_argument("--entry", help="the entry of a LLaMA-Factory directory, where it has several")
    add.add_argument("--media-dir", type=Path, action="append", default=[], metavar="DIR",
                     help="a folder that the images' paths are relative to; may be given several times")  # fmt: skip
    add.add_argument("--several", choices=("rows", "first", "most"),
                     help="of several captions or answers: all, the first, or the most frequent")  # fmt: skip
    add.set_defaults(run=_add_dataset)

    check_data = verbs.add_parser("check-data", help="validate a LLaMA-Factory directory (exit code 2 if it is wrong)")
    check_data.add_argument("folder", type=Path, metavar="DIR")
    check_data.add_argument("--media-dir", type=Path, metavar="DIR",
                            help="folder that the images' paths are relative to, as a recipe's media_dir")  # fmt: skip
    check_data.add_argument("--limit", type=at_least_one, default=20, help="problems to show per entry")
    check_data.set_defaults(run=_check_data)


def _quality(arguments: argparse.Namespace) -> int:
    from mllm_assets.data.quality.queries import ask, print_rows

    name = arguments.recipe if arguments.view == "hardest" else arguments.dataset
    if name is None:
        wanted = "--recipe" if arguments.view == "hardest" else "--dataset"
        raise RecipeError(f"quality {arguments.view} needs {wanted} NAME. Give it instead of the other one.")
    rows = ask(Layout.from_environment(), arguments.view, name, arguments.limit)
    print_rows(rows, view=arguments.view, name=name, as_json=arguments.json, wide=arguments.wide)
    return 0


def _add_dataset(arguments: argparse.Namespace) -> int:
    from mllm_assets.data.curate.columns import Chosen
    from mllm_assets.data.curate.reading import Options
    from mllm_assets.data.curate.scaffold import add_dataset
    from mllm_assets.project.read import materialize_command

    columns = ("image", "question", "answer", "label", "messages")
    options = Options(
        chosen=Chosen(**{name: getattr(arguments, name) for name in columns}),
        file=arguments.file,
        entry=arguments.entry,
        media_dir=tuple(path.resolve() for path in arguments.media_dir),
        several=arguments.several,
    )
    root = Layout.from_environment().root
    with progress_to(partial(print, file=sys.stderr, flush=True)):
        made = add_dataset(arguments.folder, Path.cwd(), root, name=arguments.name, options=options)
    print(f"{made.num_samples} samples; wrote {made.path}")
    print(f"found {made.layout}" + (f"; {made.columns}" if made.columns else ""))
    if made.name != (given := arguments.name or arguments.folder.resolve().name):
        print(f"note: {given!r} is called {made.name} here: keys have only a to z, 0 to 9 and _")
    found = made.preview
    checked = f" of the {found.num_checked} checked" if found.num_checked < made.num_samples else ""
    for reason, count in found.reject_reasons.items():
        print(f"  {count}{checked} will be rejected: {reason} (first: {found.first_rejected[reason]})")
    num_repeats = found.num_checked - found.num_usable - sum(found.reject_reasons.values())
    if num_repeats:
        print(f"  {num_repeats}{checked} repeat another's images and texts, and stay unused")
    for line in made.files:
        print(f"  {line}")
    for warning in made.warnings:
        print(f"  warning: {warning}")
    print("the first rows as the model will see them:")
    for row in made.shown:
        print(f"  {row.location}")
        for role, text in row.turns:
            print(f"    {role}: {shown_text(text)}")
    train, val = made.entries
    if not made.has_test:
        cure = "" if made.brings_split else f"; `num_test: {found.num_val}` below `split:` there makes one"
        print(f"  no test split: releases will be judged on the validation samples, which also chose{cure}")
    print("Read it (prompts, answer, split), then:")
    print("  mllm-assets check-graph")
    print(f"  {materialize_command(made.name)}")
    print(f"  mllm-assets quality rejects --dataset {made.name}")
    print("  mllm-assets check-data data")
    share = found.num_train / max(found.num_checked, 1)
    for line in _how_to_train(root, made.name, train, val, num_train=round(share * made.num_samples)):
        print(line)
    return 0


def _how_to_train(root: Path, name: str, train: str, val: str, *, num_train: int) -> list[str]:
    """A recipe on a new dataset: a copy of the demo's, where it is there, which `mllm-assets board` writes too.

    The demo's 400 steps of 16 are hundreds of passes over few samples; about 100 do: benchmarks/RESULTS.md.
    """
    example = root / "configs" / "emoji_sft.yaml"
    if not example.is_file():
        return [f"and put `dataset: {train}` and `eval_dataset: {val}` into a recipe in configs/."]
    num_steps = max(120, 6 * num_train)
    fewer = f"; s/max_steps: 400/max_steps: {num_steps}/" if num_steps < 400 else ""
    return [
        "Then train on it, with a recipe like the demo's (or one from `mllm-assets board`, tab Start):",
        f"  sed 's/emoji_/{name}_/{fewer}' configs/emoji_sft.yaml > configs/{name}_sft.yaml",
        f"  mllm-assets run {name}_sft",
    ]


def shown_text(text: str) -> str:
    """A text on one line of a terminal, cut where it is long."""
    line = "".join(char if char.isprintable() else "\\n" if char == "\n" else " " for char in text)
    return f"{line[:299]}…" if len(line) > 300 else line


def _check_data(arguments: argparse.Namespace) -> int:
    from mllm_assets.data.curate.checks import check_directory

    wrong = False
    with progress_to(partial(print, file=sys.stderr, flush=True)):
        for report in check_directory(arguments.folder, arguments.media_dir):
            wrong |= bool(report.problems)
            _print_report(report, arguments.limit)
    return 2 if wrong else 0


def _print_report(report: "EntryReport", limit: int) -> None:
    found = {"problems": report.problems, "warnings": report.warnings}
    counts = [f"{len(texts)} {kind if len(texts) > 1 else kind[:-1]}" for kind, texts in found.items() if texts]
    print(f"{report.name}: {report.num_rows} rows, {report.num_images} images: {', '.join(counts) or 'fine'}")
    for texts in found.values():
        for text in texts[:limit]:
            print(f"  {text}")
        if len(texts) > limit:
            print(f"  and {len(texts) - limit} more (--limit shows them)")
