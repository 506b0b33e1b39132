"""Options that several commands take, and how their values are read."""

import argparse
import sys
from typing import TypeAlias

from mllm_assets.settings import DEVICES, device_from_environment

DEVICE_OF_THE_MACHINE = "MLLM_ASSETS_DEVICE, or auto"

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=DEVICES, default=DEVICE_OF_THE_MACHINE, type=_device)


def _device(text: str) -> str:
    """Asked when this very command is run: another one, such as `doctor`, stands a wrong setting."""
    return device_from_environment() if text == DEVICE_OF_THE_MACHINE else text


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
