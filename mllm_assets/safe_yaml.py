"""YAML within limits: nested aliases and merge keys can turn a page into a billion nodes."""

from pathlib import Path
from typing import Any

import yaml

MAX_CHARS = 2**20
MAX_DEPTH = 50
MAX_NODES = 100_000  # each alias and each merge key counted as what it expands to


class LimitError(yaml.YAMLError):
    """The text is beyond a limit."""


class SafeLoader(yaml.SafeLoader):
    """PyYAML's own, without Python's tags, for text of limited length, depth and number of nodes."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_CHARS:
            raise LimitError(f"it has more than {MAX_CHARS:,} characters")
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Count the levels on the way down."""
        self._depth += 1
        try:
            if self._depth > MAX_DEPTH:
                raise LimitError(f"it is nested deeper than {MAX_DEPTH} levels")
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """What a node means; what means nothing, such as `!!int x` or half a character, is an error with its line."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            why = "half a character" if isinstance(error, UnicodeEncodeError) else str(error).split(";")[0]
            raise yaml.constructor.ConstructorError(None, None, why or "no value", node.start_mark) from None
        return value

    def compose_document(self) -> yaml.Node | None:
        """Count what the document expands to, before anything of it is built."""
        node = super().compose_document()
        if node is not None and _num_nodes(node, {}) > MAX_NODES:
            raise LimitError(f"its aliases and merge keys expand to more than {MAX_NODES:,} values")
        return node


def load_all(path: Path) -> list[Any]:
    """Read the documents of a file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8 text.
        yaml.YAMLError: It is not YAML, or beyond the limits.
    """
    return list(yaml.load_all(read_text(path), Loader=SafeLoader))  # noqa: S506 (a subclass of yaml.SafeLoader)


def read_text(path: Path) -> str:
    """Read a file as far as its length is judged by; errors as `load_all`."""
    with path.open(encoding="utf-8") as file:
        return file.read(MAX_CHARS + 1)


def _num_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    if id(node) not in known:
        known[id(node)] = 0  # within itself: the constructor says what is wrong with that
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        below = 0 if isinstance(node, yaml.ScalarNode) else sum(_num_nodes(part, known) for part in parts)
        known[id(node)] = 1 + below
    return known[id(node)]
