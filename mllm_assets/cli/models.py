"""A finished model's answers: `generate`, `serve` as an API, `chat` as a page."""

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_assets.cli.options import (
    Verbs,
    add_device_option,
    add_sampling_options,
    announce_home,
    at_least_one,
    given_sampling,
)
from mllm_assets.errors import DataError, MachineError
from mllm_assets.inference.addresses import BOARD_PORT, is_loopback, listen
from mllm_assets.layout import Layout
from mllm_assets.training.runs.models import HOW_TO_NAME

if TYPE_CHECKING:
    from mllm_assets.inference.answerer import Answer
    from mllm_assets.recipe.asking import Sampling
    from mllm_assets.training.runs.models import NamedModel

KEY_VARIABLE = "MLLM_ASSETS_API_KEY"
MIN_KEY_LENGTH = 16
UI_INSTALL = "pip install --no-deps -r requirements-ui.txt, a file of mllm_assets' repository"


def add_commands(verbs: Verbs) -> None:
    generate = verbs.add_parser("generate", help="a model's answer to images and a prompt")
    generate.add_argument("--model", required=True, metavar="MODEL", help=HOW_TO_NAME)
    generate.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        help="an image, may be given several times; or a folder, whose images are asked about one by one",
    )
    generate.add_argument("--prompt", required=True, help="<image> in it marks an image's place; by default before it")
    generate.add_argument("--system", help="system message")
    generate.add_argument("--template", help="turn format it was trained in, if its run does not say it")
    generate.add_argument("--max-new-tokens", type=at_least_one, default=100)
    add_sampling_options(generate)
    generate.add_argument("--batch-size", type=at_least_one, default=8, help="of a folder's images, 8 by default")
    add_device_option(generate)
    generate.add_argument("--json", action="store_true", help="print a JSON object; for a folder one per line")
    generate.set_defaults(run=_generate)

    serve = verbs.add_parser(
        "serve", help="an OpenAI-compatible server with one model, on this machine only by default"
    )
    serve.add_argument("model", metavar="MODEL", help=HOW_TO_NAME)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on, 127.0.0.1 by default")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--no-auth", action="store_true", help=f"without {KEY_VARIABLE}; on 127.0.0.1 only")
    serve.add_argument("--max-new-tokens", type=at_least_one, default=1024, help="most tokens of an answer")
    add_device_option(serve)
    serve.set_defaults(run=_serve)

    chat = verbs.add_parser("chat", help="a local page where an image and questions go to one to three models")
    chat.add_argument("models", nargs="+", metavar="MODEL", help=f"one, or up to three to compare: {HOW_TO_NAME}")
    chat.add_argument("--samples", metavar="ENTRY", help="entry of dataset_info.json to pick samples from: emoji_val")
    chat.add_argument("--media-dir", type=Path, metavar="DIR",
                      help="what their images' paths are relative to; by default as in the models' recipe")  # fmt: skip
    chat.add_argument("--host", default="127.0.0.1", help=f"elsewhere {KEY_VARIABLE} is the password of `user`")
    chat.add_argument("--port", type=int, default=7860)
    add_device_option(chat)
    chat.set_defaults(run=_chat)

    board = verbs.add_parser(
        "board", help="a local page of the project: samples, runs with live curves, answers, chat, and new runs"
    )
    board.add_argument("--host", default="127.0.0.1", help=f"elsewhere {KEY_VARIABLE} is the password of `user`")
    board.add_argument("--port", type=int, default=BOARD_PORT)
    add_device_option(board)
    board.set_defaults(run=_board)


def _generate(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from mllm_assets.recipe.asking import Sampling
    from mllm_assets.releases.find import find_named_model

    folders = [image for image in arguments.image if image.is_dir()]
    if folders and len(arguments.image) > 1:
        raise DataError(f"{folders[0]} is a folder, whose images are asked about one by one. Give it alone.")
    model = find_named_model(arguments.model, Layout.from_environment())  # before what takes seconds to import
    system = model.turns.system if arguments.system is None else arguments.system
    turns = replace(model.turns, system=system, template=arguments.template or model.turns.template)
    model = replace(model, turns=turns)
    sampling = Sampling(max_new_tokens=arguments.max_new_tokens, **given_sampling(arguments))
    if folders:
        return _generate_of_folder(folders[0], arguments, model, sampling)

    from mllm_assets.inference.generate import generate

    stream = None if arguments.json else lambda text: print(text, end="", flush=True)
    answer = generate(model, arguments.image, arguments.prompt, sampling, device=arguments.device, on_text=stream)
    print(json.dumps(_facts(answer)) if arguments.json else f"\nTime taken: {answer.latency_s:.2f} seconds")
    return 0


def _facts(answer: "Answer") -> dict[str, Any]:
    return {"text": answer.text, "time_s": answer.latency_s, "num_tokens": answer.num_tokens}


def _generate_of_folder(folder: Path, arguments: argparse.Namespace, model: "NamedModel", sampling: "Sampling") -> int:
    from mllm_assets.data.ingest.image_folder import images_below
    from mllm_assets.inference.generate import answer_files, open_model

    images = sorted(images_below(folder))
    if not images:
        raise DataError(f"{folder} holds no image files. Give a folder with PNG, JPEG or other images, or one image.")
    answerer = open_model(model, device=arguments.device)
    started, num_bad = time.perf_counter(), 0
    asked = answer_files(answerer, images, arguments.prompt, sampling, batch_size=arguments.batch_size)
    for image, answer in asked:
        name = image.relative_to(folder).as_posix()
        if isinstance(answer, DataError):
            num_bad += 1
            print(f"error: {answer}", file=sys.stderr)
        if arguments.json:
            facts = {"error": str(answer)} if isinstance(answer, DataError) else _facts(answer)
            print(json.dumps({"image": name, **facts}), flush=True)
        elif not isinstance(answer, DataError):
            print(f"{name}: {answer.text}", flush=True)
    num_asked, wall_s = len(images) - num_bad, time.perf_counter() - started
    if not arguments.json:
        print(f"Time taken: {wall_s:.2f} seconds, {num_asked} images, {num_asked / wall_s:.1f} images/s")
    if num_bad:
        print(f"error: {num_bad} of {len(images)} images could not be used", file=sys.stderr)
    return 2 if num_bad else 0


def _serve(arguments: argparse.Namespace) -> int:
    from mllm_assets.releases.find import find_named_model

    require_modules("pip install 'mllm-assets[serve]'", "fastapi", "uvicorn", "openai")
    api_key = None
    if not arguments.no_auth:
        api_key = _api_key("give --no-auth for a server that only this machine's programs can reach")
    elif not is_loopback(arguments.host):
        raise MachineError(
            f"--no-auth on {arguments.host} would let everyone in the network use the model. Set {KEY_VARIABLE}, or "
            "leave --host out."
        )
    with listen(arguments.host, arguments.port) as listening:  # before libraries and model, which take long to load
        model = find_named_model(arguments.model, Layout.from_environment())

        from mllm_assets.inference.serving import serve

        try:
            serve(
                model,
                listening,
                host=arguments.host,
                api_key=api_key,
                device=arguments.device,
                max_new_tokens=arguments.max_new_tokens,
            )
        except KeyboardInterrupt:
            print("stopped")
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from mllm_assets.releases.find import find_named_model

    require_modules(UI_INSTALL, "gradio")
    password = _password(arguments.host)
    with listen(arguments.host, arguments.port) as free:  # before libraries and models, which take long to load
        port = free.getsockname()[1]
    if len(arguments.models) > 3:
        raise MachineError(f"{len(arguments.models)} models do not fit side by side. Name one to three.")
    layout = Layout.from_environment()
    models = [find_named_model(name, layout) for name in arguments.models]

    from mllm_assets.data.sharegpt.dataset import Dataset
    from mllm_assets.inference.chat_page import Samples, chat

    trained_with = next((layout.root / model.media_dir for model in models if model.media_dir), None)
    dataset = Dataset(layout.data, media_dir=arguments.media_dir or trained_with)
    try:
        chat(
            models,
            samples=Samples.read(dataset, arguments.samples) if arguments.samples else None,
            host=arguments.host,
            port=port,
            password=password,
            device=arguments.device,
        )
    except KeyboardInterrupt:
        print("stopped")
    return 0


def _board(arguments: argparse.Namespace) -> int:
    require_modules(UI_INSTALL, "gradio")
    password = _password(arguments.host)
    with listen(arguments.host, arguments.port) as free:
        port = free.getsockname()[1]
    layout, project = Layout.from_environment(), Path.cwd()
    announce_home(layout)

    from mllm_assets.cli.board.page import board

    try:
        board(layout, project, host=arguments.host, port=port, password=password, device=arguments.device)
    except KeyboardInterrupt:
        print("stopped")
    return 0


def _password(host: str) -> str | None:
    """What a visitor of a page must know; nothing on this machine."""
    return None if is_loopback(host) else _api_key("leave --host out: then only this machine can reach it")


def _api_key(otherwise: str) -> str:
    """The key that requests must have, from the environment. `otherwise` is what the user can do instead.

    Raises:
        MachineError: It is not set, or can be guessed.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    if len(key) < MIN_KEY_LENGTH or not key.isascii() or any(character.isspace() for character in key):
        state = "is not set" if not key else f"must be at least {MIN_KEY_LENGTH} ASCII characters without spaces"
        raise MachineError(
            f"{KEY_VARIABLE} {state}. Make a key with: export {KEY_VARIABLE}=$(openssl rand -hex 24); or {otherwise}."
        )
    return key


def require_modules(how: str, *modules: str) -> None:
    """Raise a `MachineError` that says what to install, before anything loads, if a module is missing."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MachineError(f"This command needs {', '.join(missing)}. Install what it needs with: {how}")
