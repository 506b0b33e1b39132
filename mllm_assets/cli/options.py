"""What several commands share: options, how their values are read, and the folder of Dagster's history."""

import argparse
import re
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from mllm_assets.errors import did_you_mean
from mllm_assets.layout import Layout
from mllm_assets.settings import DEVICES, device_from_environment

DEVICE_OF_ENVIRONMENT = "MLLM_ASSETS_DEVICE, or auto"

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class Parser(argparse.ArgumentParser):
    """A parser that takes whole options only, and whose errors name the nearest of the words that it knows."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)  # `run emoji_sft --f` trained everything again

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            word, known = found[1], re.findall(r"[\w-]+", found[2])
            alike = did_you_mean(word, known) or "".join(
                f"Did you mean {near!r}? " for near in get_close_matches(word, known, n=1)
            )  # verbs are few and far from each other, so that two letters will do
            message = f"unknown: {word!r}. {alike}There are: {', '.join(known)}"
        super().error(message)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=DEVICES, default=DEVICE_OF_ENVIRONMENT, type=_device)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How answers are drawn; see `given_sampling`."""
    parser.add_argument("--do-sample", action="store_true", help="sample instead of greedy decoding")
    parser.add_argument("--temperature", type=float, help="of the sampling, 1.0 by default")
    parser.add_argument("--top-p", type=float, help="of the sampling, 1.0 by default")
    parser.add_argument("--seed", type=int, help="of the sampling")


def given_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, by the names of `Sampling`; says which have no effect."""
    given = {name: getattr(arguments, name) for name in ("temperature", "top_p", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not arguments.do_sample:
        print(f"note: without --do-sample {', '.join(given)} has no effect", file=sys.stderr)
    return {"do_sample": arguments.do_sample, **given}


def _device(text: str) -> str:
    """Read the variable only when the command runs, so that a wrong one does not stop others, such as `doctor`."""
    return device_from_environment() if text == DEVICE_OF_ENVIRONMENT else text


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def announce_home(layout: Layout) -> None:
    """Let Dagster's history be in the project's folder where DAGSTER_HOME is not set, and say so.

    Raises:
        MachineError: The folder cannot be made.
    """
    from mllm_assets.components.instance.home import use_home
    from mllm_assets.project.read import find_root_module

    project = Path.cwd()
    if text := use_home(project if find_root_module(project) else layout.root):
        print(text, file=sys.stderr, flush=True)


def help_without_verb(parser: argparse.ArgumentParser) -> None:
    """Make a parser print its help, which lists the verbs, as an error if no verb is given."""

    def print_help(_: argparse.Namespace) -> int:
        parser.print_help(sys.stderr)
        return 2

    parser.set_defaults(run=print_help)
