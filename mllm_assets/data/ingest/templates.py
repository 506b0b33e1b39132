"""Prompts and answers as templates: `{caption}`, `{label}`, `{question}` and any `{column}` of the row."""

import re
from collections.abc import Mapping
from functools import lru_cache

# a name as a column has it, so that the braces of JSON in a prompt stay text
_NAME = re.compile(r"(\n?)\{([^\W\d][\w.\-]*(?: [\w.\-]+)*)\}")


@lru_cache
def names_in(*templates: str) -> tuple[str, ...]:
    """The names that templates use, each once, in order."""
    return tuple(dict.fromkeys(name for template in templates for _, name in _NAME.findall(template)))


def render(template: str, values: Mapping[str, str | None]) -> str:
    """Fill a template; a brace in a value is text, and a line of a value that is missing is left out."""
    if "{" not in template:
        return template

    def filled(match: re.Match[str]) -> str:
        value = values.get(match.group(2))
        return match.group(1) + value if value else ""

    return _NAME.sub(filled, template)
