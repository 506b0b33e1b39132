"""`mllm-assets`: the commands that need no Dagster run, a module per group; torch loads only when used."""

import argparse
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Sequence

from mllm_assets import __version__
from mllm_assets.cli import approving, data, models, operations, results, reviewing, running, server_check, training
from mllm_assets.cli.options import Parser, help_without_verb
from mllm_assets.disk import CURE, NO_SPACE
from mllm_assets.errors import MllmAssetsError, did_you_mean
from mllm_assets.plugins import load_plugins
from mllm_assets.redaction import redacted_output
from mllm_assets.worker.launch import SPIN, SPIN_TURNS, WorkerCrashed
from mllm_assets.worker.run import refuse_hub_kernels

GROUPS = (running, training, models, server_check, results, approving, data, reviewing, operations)
EXAMPLES = {
    "run": "emoji_sft max_steps=60 --dry-run",
    "enable": "gemma3_lora_sft",
    "train": "configs/emoji_sft.yaml max_steps=50",
    "inspect": "configs/emoji_sft.yaml --row 3",
    "generate": "--model releases/emoji_sft/v1 --image docs/images/face.png --prompt 'What kind of emoji is this?'",
    "chat": "emoji_sft",
    "board": "",
    "serve": "emoji_sft",
    "check-server": "http://127.0.0.1:8000/v1 --model emoji_sft --on emoji_val",
    "summary": "emoji_sft max_steps=50",
    "evaluate": "emoji_sft --max-samples 100",
    "compare": "emoji_sft emoji_projector_sft",
    "releases": "list emoji_sft",
    "approve": "emoji_sft --why 'the mistakes are between alike faces'",
    "quality": "worst --dataset emoji",
    "review": "emoji list --recipe emoji_sft --wrong",
    "add-dataset": "my/photos --name birds",
    "check-data": "data",
    "init": "birds",
    "doctor": "--repair",
    "gc": "--keep-runs 3 --older-than 14d",
    "slots": "free",
    "check-graph": "",
}
EXIT_READER_GONE = 128 + signal.SIGPIPE  # what a shell shows for a program that the signal ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Exit code 2 means that the user must fix something; the message says what."""
    refuse_hub_kernels()
    os.environ.setdefault(SPIN, SPIN_TURNS)  # before torch loads: `generate` and `serve` compute in this process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name, or a text, may hold half a character
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            with redacted_output():
                return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `mllm-assets ... | head`: the reader has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python prints the error at exit
        return EXIT_READER_GONE


def _run(argv: Sequence[str] | None) -> int:
    try:
        load_plugins()
        arguments = parse(argv)
        return arguments.run(arguments) or 0
    except MllmAssetsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkerCrashed as crash:
        print(f"error: {crash}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP, *NO_SPACE):
            raise
        where = f"{str(error.filename)[:80]!r}: {error.strerror}"
        print(f"error: {where}. {CURE if error.errno in NO_SPACE else 'Correct the path.'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, and the same command resumes from it", file=sys.stderr)
        return 130


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read a command line; `key=value` may come before, between and after the options."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse ends a list of positionals at the first option; `parse_intermixed_args` does not support subparsers
    unknown = [text for text in rest if text.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        parser = vars(arguments).get("parser", parser)
        known = re.findall(r"(?<!\w)--[\w-]+", parser.format_help())
        parser.error(f"unrecognized arguments: {' '.join(unknown)}. {did_you_mean(unknown[0], known)}".rstrip(". "))
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mllm-assets", description="Fine-tune vision-language models.")
    parser.add_argument("--version", action="version", version=f"mllm-assets {__version__}")
    verbs = parser.add_subparsers(metavar="VERB")
    help_without_verb(parser)
    for group in GROUPS:
        group.add_commands(verbs)
    for verb, example in EXAMPLES.items():
        verbs.choices[verb].set_defaults(parser=verbs.choices[verb])
        verbs.choices[verb].epilog = f"example: mllm-assets {verb} {example}".rstrip()
    return parser
