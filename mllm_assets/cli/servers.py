"""A model behind an address: `serve` for programs, `chat` for people."""

import argparse
import importlib.util
import os

from mllm_assets.cli.options import Verbs, add_device_option, at_least_one
from mllm_assets.errors import MachineError
from mllm_assets.inference import HOW_TO_NAME
from mllm_assets.inference.addresses import is_loopback, listen
from mllm_assets.layout import Layout

KEY_VARIABLE = "MLLM_ASSETS_API_KEY"
MIN_KEY_LENGTH = 16


def add_commands(verbs: Verbs) -> None:
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

    chat = verbs.add_parser("chat", help="a local page where an image and a question go to one or two models")
    chat.add_argument("models", nargs="+", metavar="MODEL", help=f"one, or two to compare: {HOW_TO_NAME}")
    chat.add_argument("--samples", metavar="ENTRY", help="entry of dataset_info.json to pick samples from: emoji_val")
    chat.add_argument("--host", default="127.0.0.1", help=f"elsewhere {KEY_VARIABLE} is the password of `user`")
    chat.add_argument("--port", type=int, default=7860)
    add_device_option(chat)
    chat.set_defaults(run=_chat)


def _serve(arguments: argparse.Namespace) -> int:
    from mllm_assets.inference.naming import find_named_model

    _require("pip install 'mllm-assets[serve]'", "fastapi", "uvicorn", "openai")
    api_key = (
        None
        if arguments.no_auth
        else _api_key("give --no-auth for a server that only this machine's programs can reach")
    )
    if arguments.no_auth and not is_loopback(arguments.host):
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
    from mllm_assets.inference.naming import find_named_model

    _require("pip install --no-deps -r requirements-ui.txt, a file of mllm_assets' repository", "gradio")
    password = None if is_loopback(arguments.host) else _api_key("leave --host out: then only this machine asks")
    with listen(arguments.host, arguments.port) as free:  # before libraries and models, which take long to load
        port = free.getsockname()[1]
    if len(arguments.models) > 2:
        raise MachineError(f"{len(arguments.models)} models do not fit side by side. Name one or two.")
    layout = Layout.from_environment()
    models = [find_named_model(name, layout) for name in arguments.models]

    from mllm_assets.inference.chat_page import chat

    try:
        chat(
            models,
            data_dir=layout.data,
            entry=arguments.samples,
            host=arguments.host,
            port=port,
            password=password,
            device=arguments.device,
        )
    except KeyboardInterrupt:
        print("stopped")
    return 0


def _api_key(otherwise: str) -> str:
    """The key that requests must bring, from the environment. `otherwise` is what else a person can do.

    Raises:
        MachineError: There is none, or one that can be guessed.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    if len(key) < MIN_KEY_LENGTH or not key.isascii() or any(character.isspace() for character in key):
        state = "is not set" if not key else f"must be at least {MIN_KEY_LENGTH} ASCII characters without spaces"
        raise MachineError(
            f"{KEY_VARIABLE} {state}. Make a key with: export {KEY_VARIABLE}=$(openssl rand -hex 24); or {otherwise}."
        )
    return key


def _require(how: str, *modules: str) -> None:
    """Say what to install before anything loads.

    Raises:
        MachineError: One of the modules is missing.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MachineError(f"This command needs {', '.join(missing)}. Install what it needs with: {how}")
