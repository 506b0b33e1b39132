"""`mllm-assets`: what can be done without Dagster. A module for each group of commands; torch loads only when used."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from mllm_assets.cli import data, models, operations, releases, results, servers, training
from mllm_assets.cli.options import help_without_verb
from mllm_assets.errors import MllmAssetsError
from mllm_assets.hub_kernels import refuse_hub_kernels
from mllm_assets.redaction import redacted_output
from mllm_assets.training.launch import WorkerCrashed

GROUPS = (training, models, servers, results, releases, data, operations)
EXIT_READER_GONE = 128 + signal.SIGPIPE  # what a shell shows for a program that the signal ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Exit code 2 says that something is for the user to mend; the message says what."""
    refuse_hub_kernels()
    try:
        try:
            with redacted_output():
                return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `mllm-assets ... | head`: who read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says so when it ends
        return EXIT_READER_GONE


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = parse(argv)
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read a command line; `key=value` may stand before, between and behind the options."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse closes a list of positionals at the first option, and mixes the two in parsers without verbs only
    unknown = [text for text in rest if text.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mllm-assets", description="Fine-tune vision-language models.")
    verbs = parser.add_subparsers(metavar="VERB")
    help_without_verb(parser)
    for group in GROUPS:
        group.add_commands(verbs)
    return parser
