"""Options that several commands take, and how their values are read."""

import argparse
import os
import sys
from typing import TypeAlias

from mllm_assets.errors import MachineError

DEVICES = ("auto", "cuda", "mps", "cpu")

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def device_from_environment() -> str:
    device = os.environ.get("MLLM_ASSETS_DEVICE", "auto")
    if device not in DEVICES:
        raise MachineError(
            f"MLLM_ASSETS_DEVICE is {device!r}: expected one of {', '.join(DEVICES)}. Correct or unset it."
        )
    return device


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def help_without_verb(parser: argparse.ArgumentParser) -> None:
    """Let a parser that is given no verb print its help, which lists them, as an error."""

    def print_help(_: argparse.Namespace) -> int:
        parser.print_help(sys.stderr)
        return 2

    parser.set_defaults(run=print_help)
