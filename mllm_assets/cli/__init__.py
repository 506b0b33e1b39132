"""`mllm-assets`: what can be done without Dagster. A module for each group of commands; torch loads only when used."""

import argparse
import sys
from collections.abc import Sequence

from mllm_assets.cli import data, models, operations, releases, results, servers, training
from mllm_assets.errors import MllmAssetsError
from mllm_assets.training.launch import WorkerCrashed

GROUPS = (training, models, servers, results, releases, data, operations)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mllm-assets", description="Fine-tune vision-language models.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for group in GROUPS:
        group.add_commands(verbs)
    return parser
