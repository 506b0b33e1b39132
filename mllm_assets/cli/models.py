"""What a finished model says: `generate`."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_assets.cli.options import Verbs, add_device_option, at_least_one
from mllm_assets.errors import DataError
from mllm_assets.inference import HOW_TO_NAME
from mllm_assets.layout import Layout

if TYPE_CHECKING:
    from mllm_assets.inference.answerer import Answerer, Sampling


def add_commands(verbs: Verbs) -> None:
    generate = verbs.add_parser("generate", help="a model's answer to images and a prompt")
    generate.add_argument("--model", required=True, metavar="MODEL", help=HOW_TO_NAME)
    generate.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        help="an image, may be given several times; a folder: each image in it is asked about on its own",
    )
    generate.add_argument("--prompt", required=True, help="<image> in it says where an image stands; else before it")
    generate.add_argument("--system", help="system message")
    generate.add_argument("--template", help="turn format it was trained in, where its run does not say it")
    generate.add_argument("--max-new-tokens", type=at_least_one, default=100)
    generate.add_argument("--do-sample", action="store_true", help="sample in place of greedy decoding")
    generate.add_argument("--temperature", type=float, help="of the sampling, 1.0 by default")
    generate.add_argument("--top-p", type=float, help="of the sampling, 1.0 by default")
    generate.add_argument("--seed", type=int, help="of the sampling")
    generate.add_argument("--batch-size", type=at_least_one, default=8, help="of a folder's images, 8 by default")
    add_device_option(generate)
    generate.add_argument("--json", action="store_true", help="print a JSON object, of a folder one a line")
    generate.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from mllm_assets.inference.naming import find_named_model

    folder = _folder(arguments.image)
    model = find_named_model(arguments.model, Layout.from_environment())  # before what takes seconds to import
    if arguments.template:
        model = replace(model, template=arguments.template)

    from mllm_assets.inference.answerer import Sampling
    from mllm_assets.inference.generate import open_model, prompt_row

    given = {name: getattr(arguments, name) for name in ("temperature", "top_p", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not arguments.do_sample:
        print(f"note: without --do-sample {', '.join(given)} has no effect", file=sys.stderr)
    sampling = Sampling(do_sample=arguments.do_sample, **given)
    row = None if folder else prompt_row(arguments.image, arguments.prompt)
    answerer = open_model(model, device=arguments.device, system=arguments.system)
    if row is None:
        return _generate_of_folder(arguments, answerer, sampling)

    from mllm_assets.inference.generate import ask

    tell = None if arguments.json else lambda text: print(text, end="", flush=True)
    answer = ask(answerer, row, max_new_tokens=arguments.max_new_tokens, sampling=sampling, tell=tell)
    if arguments.json:
        print(json.dumps({"text": answer.text, "time_s": answer.time_s, "num_tokens": answer.num_tokens}))
    else:
        print(f"\nTime taken: {answer.time_s:.2f} seconds")
    return 0


def _folder(images: list[Path]) -> Path | None:
    """The folder whose images are asked about one by one, if one is given.

    Raises:
        DataError: Something else is given too.
    """
    folders = [image for image in images if image.is_dir()]
    if folders and len(images) > 1:
        raise DataError(f"{folders[0]} is a folder, whose images are asked about one by one. Give it alone.")
    return folders[0] if folders else None


def _generate_of_folder(arguments: argparse.Namespace, answerer: "Answerer", sampling: "Sampling") -> int:
    from mllm_assets.data.image_folder import images_below
    from mllm_assets.inference.generate import answer_files

    (folder,) = arguments.image
    images = sorted(images_below(folder))
    if not images:
        raise DataError(f"{folder} holds no image files. Give a folder with PNG, JPEG or other images, or one image.")
    started, num_bad = time.perf_counter(), 0
    for found in answer_files(
        answerer,
        images,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        batch_size=arguments.batch_size,
    ):
        name = found.image.relative_to(folder).as_posix()
        if found.answer is None:
            num_bad += 1
            print(f"error: {found.error}", file=sys.stderr)
        if arguments.json:
            answer = found.answer
            said = {"text": answer.text, "time_s": answer.time_s, "num_tokens": answer.num_tokens} if answer else {}
            print(json.dumps({"image": name, **(said or {"error": found.error})}), flush=True)
        elif found.answer is not None:
            print(f"{name}: {found.answer.text}", flush=True)
    num_asked, wall_s = len(images) - num_bad, time.perf_counter() - started
    if not arguments.json:
        print(f"Time taken: {wall_s:.2f} seconds, {num_asked} images, {num_asked / wall_s:.1f} images/s")
    if num_bad:
        print(f"error: {num_bad} of {len(images)} images could not be used", file=sys.stderr)
    return 2 if num_bad else 0
