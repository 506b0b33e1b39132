"""`check-server`: whether a server answers as the model that it was given."""

import argparse
import json
import sys

from mllm_assets.cli.models import require_modules
from mllm_assets.cli.options import Verbs, add_device_option, at_least_one
from mllm_assets.layout import Layout
from mllm_assets.training.runs.models import HOW_TO_NAME


def add_commands(verbs: Verbs) -> None:
    check = verbs.add_parser("check-server", help="whether a server, such as vLLM, answers as the model it was given")
    check.add_argument("url", metavar="URL", help="OpenAI-compatible, for example http://127.0.0.1:8000/v1")
    check.add_argument("--model", required=True, metavar="MODEL", help=HOW_TO_NAME)
    check.add_argument("--on", required=True, metavar="ENTRY", help="whose questions are asked: emoji_val")
    check.add_argument("--served-name", metavar="NAME", help="the model there; by default the only one")
    check.add_argument("--max-samples", type=at_least_one, default=32, help="spread over the entry, 32 by default")
    check.add_argument("--max-new-tokens", type=at_least_one, default=64)
    check.add_argument("--min-agreement", type=_share, default=0.9, metavar="SHARE", help="0.9 by default")
    add_device_option(check)
    check.add_argument("--json", action="store_true", help="print a JSON object with all rows")
    check.set_defaults(run=_check_server)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"expected a share of 0 to 1, got {text!r}")
    return share


def _check_server(arguments: argparse.Namespace) -> int:
    from mllm_assets.data.sharegpt.dataset import Dataset
    from mllm_assets.progress import progress_to
    from mllm_assets.releases.find import find_named_model

    require_modules("pip install 'mllm-assets[serve]'", "openai")
    layout = Layout.from_environment()
    model = find_named_model(arguments.model, layout)
    media_dir = layout.root / model.media_dir if model.media_dir else None
    entry = Dataset(layout.data, media_dir=media_dir).entry(arguments.on)

    from mllm_assets.evaluation.agreement import Agreement
    from mllm_assets.evaluation.same_answers import Loaded, compare, some_rows
    from mllm_assets.evaluation.served import Served, connect
    from mllm_assets.inference.generate import open_model

    with progress_to(lambda line: print(line, file=sys.stderr, flush=True)):
        asked_for = Agreement(
            max_samples=arguments.max_samples,
            max_new_tokens=arguments.max_new_tokens,
            min_agreement=arguments.min_agreement,
        )
        rows = some_rows(entry, asked_for)
        answerer = open_model(model, device=arguments.device)
        served = Served(connect(arguments.url), arguments.served_name, answerer.encoder.turns.system)
        found = compare(Loaded(answerer, scores=False), served, rows, asked_for)
    print(json.dumps(found.to_dict(), indent=1) if arguments.json else found.describe())
    return 0 if found.passed else 1
