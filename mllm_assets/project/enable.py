"""Switch on a recipe, a dataset or a model that is declared and off, in its `defs.yaml`: `mllm-assets enable NAME`."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from mllm_assets.artifacts import UNNAMED, slug, write_text_atomic
from mllm_assets.errors import RecipeError, did_you_mean
from mllm_assets.project.read import root_module
from mllm_assets.safe_yaml import load_all

OFF_LINE = r"enabled:[ ]*(?:false|no|off|False|No|Off)\b"
Edit = tuple[Path, str, Callable[[dict[str, Any]], bool]]  # the file, its new text, and what must hold of a document


def enable(project: Path, name: str) -> str:
    """Switch on what has the name, and return what was changed.

    Raises:
        RecipeError: Nothing has the name, or its file cannot be changed without losing what is in it; says what to
            write by hand.
    """
    wanted = slug(name)
    known: dict[str, Edit | None] = {}
    for path, text, document in _documents(project):
        known |= _switches(project, path, text, document, wanted)
    if wanted not in known:
        raise RecipeError(
            f"Nothing that can be switched on is called {name!r}. {did_you_mean(wanted, known)}There are: "
            f"{', '.join(sorted(known))}."
        )
    if (edit := known[wanted]) is None:
        return f"{name} is on already."
    path, text, holds = edit
    before = path.read_text(encoding="utf-8")
    write_text_atomic(path, text)
    try:
        is_on = any(isinstance(document, dict) and holds(document) for document in load_all(path))
    except (ValueError, yaml.YAMLError):
        is_on = False
    if not is_on:
        write_text_atomic(path, before)
        raise RecipeError(
            f"{path.relative_to(project)} is written in a way that this command does not change. Write it yourself: "
            f"`enabled: [{wanted}]` for a recipe, `enabled: true` for a dataset or a model."
        )
    return f"{name} is on: see enabled in {path.relative_to(project)}"


def _documents(project: Path) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    for path in sorted((project / root_module(project).replace(".", "/") / "defs").rglob("defs.yaml")):
        try:
            documents = load_all(path)
        except (OSError, ValueError, yaml.YAMLError):
            continue  # `check-graph` says what is wrong with it
        text = path.read_text(encoding="utf-8")
        for document in documents:
            if isinstance(document, dict) and isinstance(document.get("attributes") or {}, dict):
                yield path, text, document


def _switches(project: Path, path: Path, text: str, document: dict[str, Any], wanted: str) -> dict[str, Edit | None]:
    """What a document can switch on, by slug; for the wanted one the edit, or None where it is on."""
    values, kind = document.get("attributes") or {}, str(document.get("type")).rpartition(".")[2]
    if kind == "FineTuning":
        pattern = str(values.get("recipes") or "configs/*.yaml").lstrip("/")
        names = {slug(file.stem, UNNAMED) for file in project.glob(pattern)}
        on = [slug(str(name), UNNAMED) for name in _list(values, "enabled")]
        edit = None if wanted in on else (path, _with_recipe(text, [*on, wanted]), _has_recipe(wanted))
        return dict.fromkeys(names, edit)
    if kind == "ImageTextDataset" and "name" in values:
        name = slug(str(values["name"]), UNNAMED)
        new = re.sub(rf"^  {OFF_LINE}", "  enabled: true", text, count=1, flags=re.MULTILINE)
        return {name: None if _is_on(values) else (path, new, lambda found: _is_on(found["attributes"]))}
    if kind == "PretrainedModels":
        declared = [model for model in _list(values, "models") if isinstance(model, dict) and "name" in model]
        models = {slug(str(model["name"]), UNNAMED): model for model in declared}
        return {
            name: None if _is_on(model) else (path, _with_model(text, str(model["name"])), _has_model(model["name"]))
            for name, model in models.items()
        }
    return {}


def _list(values: dict[str, Any], key: str) -> list[Any]:
    """A list of a YAML, or nothing where it is something else: `check-graph` says so."""
    return value if isinstance(value := values.get(key), list) else []


def _with_recipe(text: str, names: list[str]) -> str:
    line = f"  enabled: [{', '.join(names)}]"
    new, count = re.subn(r"^  enabled:[^\n#]*", f"{line} ", text, count=1, flags=re.MULTILINE)
    if count:
        return re.sub(r"[ ]+$", "", new, flags=re.MULTILINE)
    return re.sub(r"^attributes:[^\n]*$", lambda found: f"{found[0]}\n{line}", text, count=1, flags=re.MULTILINE)


def _has_recipe(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda found: name in ((found.get("attributes") or {}).get("enabled") or [])


def _with_model(text: str, name: str) -> str:
    """The first `enabled: false` between the model's name and the next name."""
    item = rf"(name:[ ]*[\"']?{re.escape(name)}[\"']?(?![\w.-])(?:(?!\bname:).)*?){OFF_LINE}"
    return re.sub(item, r"\1enabled: true", text, count=1, flags=re.DOTALL)


def _has_model(name: str) -> Callable[[dict[str, Any]], bool]:
    def holds(found: dict[str, Any]) -> bool:
        models = (found.get("attributes") or {}).get("models") or []
        return any(model.get("name") == name and _is_on(model) for model in models if isinstance(model, dict))

    return holds


def _is_on(values: dict[str, Any]) -> bool:
    return values.get("enabled", True) is True
