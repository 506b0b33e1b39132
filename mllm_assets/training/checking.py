"""Whether a YAML value has the type that a key declares."""

import types
import typing
from typing import Any, Literal


class WrongTypeError(ValueError):
    """The value does not fit; the text says what was expected and what was found."""


def convert(value: Any, annotation: Any) -> Any:
    """Return `value` as the annotated type, where YAML's own type says the same thing.

    A whole float serves as int (`1e3`), an int as float, a list of strings as a comma list. A string never becomes
    a number or a boolean.

    Raises:
        WrongTypeError: It does not fit.
    """
    if annotation is Any:
        return value
    options = _options(annotation)
    if value is None and type(None) in options:
        return None
    literals = [choice for option in options if typing.get_origin(option) is Literal for choice in option.__args__]
    if literals and isinstance(value, bool) and value is False and "no" in literals:
        return "no"  # YAML reads a bare `no` as false; transformers would fail on it
    if literals and value in literals:
        return value
    for option in options:
        fits, converted = _as_plain(value, typing.get_origin(option) or option)
        if fits:
            return converted
    raise WrongTypeError(f"expected {describe(annotation)}, got {_shown(value)}")


def describe(annotation: Any) -> str:
    """The type in words for a message."""
    words = []
    for option in _options(annotation):
        if typing.get_origin(option) is Literal:
            words.append("one of " + ", ".join(map(str, option.__args__)))
        else:
            words.append(_WORDS.get(typing.get_origin(option) or option, "another value"))
    return " or ".join(words)


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    type(None): "null",
}


def _options(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return annotation.__args__ if is_union else (annotation,)


def _as_plain(value: Any, kind: Any) -> tuple[bool, Any]:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number:
        return value == value and abs(value) != float("inf"), value
    if kind is int and is_number:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return whole, int(value) if whole else value
    if kind is str and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return True, ",".join(value)
    if kind in (bool, str, dict):
        return isinstance(value, kind), value
    return False, value


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    return f"{'the text ' if isinstance(value, str) else ''}{value!r}"
