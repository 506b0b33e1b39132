"""Dataclasses as JSON: written completely, and read strictly by their type hints."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mllm_assets.errors import nearest


class KeyProblem(Exception):
    """What is wrong with a key of JSON."""


def encode(value: Any) -> Any:
    """Return what JSON can hold of dataclasses, paths and tuples."""
    if is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def decode(kind: Any, value: Any, key: str = "") -> Any:
    """Read a value of a type from JSON; `key` says where it is.

    Raises:
        KeyProblem: A key is unknown, missing or of another type. Names it.
    """
    origin, arms = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        return _decode_fields(kind, value, f"{key}." if key else "")
    if origin in (Union, UnionType):
        return _decode_union(arms, value, key)
    if origin is tuple and isinstance(value, list):
        kinds = arms[:1] * len(value) if arms[-1] is Ellipsis else arms
        if len(kinds) == len(value):
            return tuple(decode(kinds[i], item, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {name: decode(arms[1], item, f"{key}.{name}") for name, item in value.items()}
    if origin is list and isinstance(value, list):
        return [decode(arms[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is Any or type(value) is kind or (kind is float and type(value) is int):
        return value
    if origin is Literal and any(value == arm and type(value) is type(arm) for arm in arms):
        return value
    expected = " or ".join(map(repr, arms)) if origin is Literal else getattr(kind, "__name__", str(kind))
    raise KeyProblem(f"{key} is of the type {type(value).__name__}, expected {expected}.")


def _decode_union(arms: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and NoneType in arms:
        return None
    *others, last = (arm for arm in arms if arm is not NoneType)
    for arm in others:
        try:
            return decode(arm, value, key)
        except KeyProblem:
            continue
    return decode(last, value, key)


def _decode_fields(kind: Any, value: dict[str, Any], prefix: str) -> Any:
    known = [field.name for field in fields(kind)]
    for name in value:
        if name not in known:
            near = [f"; the nearest is {prefix}{other}" for other in nearest(name, known)]
            raise KeyProblem(f"the key {prefix}{name} is unknown{''.join(near)}.")
    if missing := [name for name in known if name not in value]:
        raise KeyProblem(f"the key {prefix}{missing[0]} is missing.")
    hints = get_type_hints(kind)
    return kind(**{name: decode(hints[name], value[name], f"{prefix}{name}") for name in known})
