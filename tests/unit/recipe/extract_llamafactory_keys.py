"""Make tests/golden/llamafactory_keys.json again: what the released LLaMA-Factory declares, read without importing it.

pip download --no-deps llamafactory==0.9.5 -d DIR && python tests/unit/recipe/extract_llamafactory_keys.py DIR/*.whl
"""

import ast
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[2] / "golden" / "llamafactory_keys.json"
FILES = ("model_args", "data_args", "training_args", "finetuning_args", "generating_args")  # parser.py, _TRAIN_ARGS


def extract(wheel: Path) -> dict[str, dict[str, Any]]:
    """Default and type of each argument; a default that is not a literal is null with `"is_literal": false`."""
    keys: dict[str, dict[str, Any]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            module = ast.parse(archive.read(f"llamafactory/hparams/{name}.py"))
            for owner in (node for node in module.body if isinstance(node, ast.ClassDef)):
                for item in owner.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        keys.update(_argument(item, item.target.id))
    return keys


def _argument(item: ast.AnnAssign, name: str) -> dict[str, dict[str, Any]]:
    assert isinstance(item.value, ast.Call)
    options = {keyword.arg: keyword.value for keyword in item.value.keywords}
    if "init" in options:  # derived, not for recipes
        return {}
    kind = ast.unparse(item.annotation)
    try:
        return {name: {"type": kind, "default": eval(ast.unparse(options["default"]), {}), "is_literal": True}}
    except NameError:  # a member of an enum
        return {name: {"type": kind, "default": None, "is_literal": False}}


if __name__ == "__main__":
    found = extract(Path(sys.argv[1]))
    GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(found)} keys in {GOLDEN}")
