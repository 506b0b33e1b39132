"""What came of a recipe: `summary`."""

import argparse

from mllm_assets.cli.options import Verbs
from mllm_assets.layout import Layout


def add_commands(verbs: Verbs) -> None:
    summary = verbs.add_parser("summary", help="where a recipe's results are and what they say")
    summary.add_argument("recipe", help="recipe name, for example emoji_sft")
    summary.set_defaults(run=_summary)


def _summary(arguments: argparse.Namespace) -> int:
    from mllm_assets.summary import summarise

    print(summarise(Layout.from_environment(), arguments.recipe))
    return 0
