"""YAML within limits: a page of text is not a billion values, nor a walk without an end."""

import time
from pathlib import Path

import pytest

from mllm_assets.errors import RecipeError
from mllm_assets.recipe.yaml_file import parse_value, parse_yaml, read_yaml
from mllm_assets.safe_yaml import LimitError, load_all


def merges(levels: int) -> str:
    """Each level merges the one before it ten times."""
    lines = ["l0: &l0 {a: 1, b: 2}"]
    lines += [f"l{n}: &l{n}\n  <<: [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, levels + 1)]
    return "\n".join(lines)


def laughs(levels: int) -> str:
    return "\n".join(
        ["l0: &l0 [a]", *(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, levels + 1))]
    )


@pytest.mark.attack("YAML")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (merges(10), "its aliases and merge keys expand to more than 100,000 values"),
        (laughs(30), "its aliases and merge keys expand to more than 100,000 values"),
        ("{a: " * 60 + "1" + "}" * 60, "it is nested deeper than 50 levels"),
        ("a: " + "x" * 2**21, "it has more than 1,048,576 characters"),
    ],
)
def test_a_recipe_beyond_the_limits_is_refused_at_once(tmp_path: Path, text: str, said: str) -> None:
    """Ten merge keys kept the code location busy for ever."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    began_s = time.monotonic()
    for read in (lambda: read_yaml(path, "r.yaml"), lambda: parse_yaml(text, "r.yaml")):
        with pytest.raises(RecipeError, match=f"r.yaml is not read: {said}"):
            read()
    with pytest.raises(LimitError):
        load_all(path)
    with pytest.raises(RecipeError):
        parse_value(text, "key=value")
    assert time.monotonic() - began_s < 5


def test_aliases_and_merge_keys_of_a_persons_size_are_read() -> None:
    entries = parse_yaml(merges(2) + "\nmine: {<<: *l2, b: 3}", "r.yaml")
    assert entries["mine"].value == {"a": 1, "b": 3}


@pytest.mark.attack("YAML")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"? {'9' * 5000}\n: 1", "r.yaml:1: expected a key's name, found '999"),
        ("? !!python/object:os.system x\n: 1", "r.yaml:1: expected a key's name, found 'x'"),
        ("a: &a {b: 1}\n<<: *a", "r.yaml:2: expected a key's name, found '<<'"),
        ("[a, b]: 1", "r.yaml:1: expected a key's name, found a sequence"),
        (f"a: {'9' * 5000}", "r.yaml:1: the value of a cannot be read .Exceeds the limit"),
        ("a: !!int x", "r.yaml:1: the value of a cannot be read .invalid literal"),
        ("a: !!int ''", "r.yaml:1: the value of a cannot be read"),
        ("a: !!float x", "r.yaml:1: the value of a cannot be read"),
        ("a: [!!bool x]", "r.yaml:1: the value of a cannot be read"),
        ("a: !!timestamp 2001-99-99", "r.yaml:1: the value of a cannot be read .month must be in"),
        ('a: {b: "\\ud800"}', "r.yaml:1: the value of a cannot be read .half a character"),
    ],
    ids=lambda text: text[:24],
)
def test_what_means_nothing_is_named_with_its_line(text: str, said: str) -> None:
    """Each ended in a library's traceback, some on the command line alone."""
    with pytest.raises(RecipeError, match=said):
        parse_yaml(text, "r.yaml")
    value = text.partition(": ")[2]
    if "!!" in value or "999" in value or "ud800" in value:
        with pytest.raises(RecipeError, match="key=value: the value cannot be read as YAML"):
            parse_value(value, "key=value")
