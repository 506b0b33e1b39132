"""What a finished model says: `generate`."""

import argparse
import json
from pathlib import Path

from mllm_assets.cli.options import DEVICES, Verbs, device_from_environment


def add_commands(verbs: Verbs) -> None:
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
    generate.add_argument("--device", choices=DEVICES, default=device_from_environment())
    generate.add_argument("--json", action="store_true", help="print one JSON object")
    generate.set_defaults(run=_generate)


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
