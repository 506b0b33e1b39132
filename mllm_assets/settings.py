"""Settings of a deployment from environment variables; one that is empty counts as not set."""

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from mllm_assets.errors import MachineError

DEVICES = ("auto", "cuda", "mps", "cpu")
LAUNCHERS = ("local", "ray")
PLUGINS = "MLLM_ASSETS_PLUGINS"  # modules that register model families, metrics, ...; see `plugins.load_plugins`

Number = TypeVar("Number", int, float)


def device_from_environment() -> str:
    """Where models compute.

    Raises:
        MachineError: `MLLM_ASSETS_DEVICE` is not one of `DEVICES`.
    """
    return choice("MLLM_ASSETS_DEVICE", DEVICES)


def choice(name: str, known: Sequence[str]) -> str:
    """One of a few words, the first by default.

    Raises:
        MachineError: It is another. Names the variable and what can be given.
    """
    value = os.environ.get(name) or known[0]
    if value not in known:
        raise MachineError(f"{name} is {value!r}: expected one of {', '.join(known)}. Correct or unset it.")
    return value


def number(name: str, default: Number, *, least: Number, kind: Callable[[str], Number]) -> Number:
    """A number; an integer if `kind` is int.

    Raises:
        MachineError: It is not such a number. Names the variable.
    """
    text = os.environ.get(name) or str(default)
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not least <= value < float("inf"):
        what = "a whole number" if kind is int else "a number"
        raise MachineError(f"{name} is {text!r}: expected {what} of at least {least}. Correct or unset it.")
    return value
