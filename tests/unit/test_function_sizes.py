"""Functions that fit on a screen and take what they mean."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "mllm_assets"
MOST_PARAMETERS = 7
MOST_LINES = 60


def too_large(source: str, path: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            num_parameters = sum(argument.arg not in ("self", "cls") for argument in given)
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_parameters > MOST_PARAMETERS or num_lines > MOST_LINES:
                yield f"{path}:{node.lineno} {node.name} has {num_parameters} parameters and {num_lines} lines"


def test_no_function_has_more_than_7_parameters_or_60_lines() -> None:
    """A long one is several with a name each; a list of parameters that grows is an object without a name."""
    files = sorted(PACKAGE.rglob("*.py"))
    found = [line for f in files for line in too_large(f.read_text(), f.relative_to(PACKAGE.parent).as_posix())]
    assert len(files) > 100 and not found, "\n".join(found)


def test_a_function_that_is_too_large_is_named_with_its_place() -> None:
    wide = f"def wide({', '.join(f'p{i}' for i in range(8))}): ...\n"
    long = "class A:\n    async def long(self):\n" + "        pass\n" * 60
    assert list(too_large(wide + long, "a.py")) == [
        "a.py:1 wide has 8 parameters and 1 lines",
        "a.py:3 long has 0 parameters and 61 lines",
    ]
    assert not list(too_large("def fits(self, a, b, c, d, e, f, g):\n" + "    pass\n" * 59, "a.py"))
