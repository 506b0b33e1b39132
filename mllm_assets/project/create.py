"""Make a project with the emoji example in an empty folder: `mllm-assets init DIR`.

Recipes, declarations and Dagster's settings are the repository's own files: in the wheel they are in `shared/`, in a
checkout at its top.
"""

import importlib.util
import keyword
import os
import shutil
from pathlib import Path

from mllm_assets import __version__
from mllm_assets.artifacts import slug
from mllm_assets.errors import MachineError, RecipeError
from mllm_assets.pages import page_template

PACKAGE = Path(__file__).parents[1]
HOME = ".dagster_home"  # Dagster's folder in a project
MAY_BE_THERE = {".git", ".venv"}  # `git init` and the environment that this runs in come first
SHARED = ("configs", "dagster.yaml", "workspace.yaml", ".gitignore")
TEMPLATES = ("README.md", "Makefile", "pyproject.toml")


def create_project(folder: Path, *, name: str | None = None) -> list[str]:
    """Write a project's files and return their names.

    Args:
        folder: Made if it does not exist; otherwise it must be empty, except for `.git` and `.venv`.
        name: Of its Python package and code location; by default the folder's.

    Raises:
        RecipeError: The folder holds something, or a name cannot be a folder's or a package's. Nothing was written.
        MachineError: The folder cannot be made or written.
    """
    folder = folder.absolute()
    for what in (folder.name, name or ""):
        if not what.isprintable():
            raise RecipeError(f"{what[:40]!r} holds a character that cannot be printed. Name the project otherwise.")
    was_there = os.path.lexists(folder)
    try:
        return _create_project(folder, name)
    except OSError as error:
        if not was_there:
            shutil.rmtree(folder, ignore_errors=True)
        where = "" if error.filename is None or Path(error.filename) == folder else f" at {error.filename}"
        raise MachineError(
            f"{folder} cannot be made: {error.strerror or error}{where}. Name a folder that this user may write to."
        ) from None


def _create_project(folder: Path, name: str | None) -> list[str]:
    there = sorted(path.name for path in folder.iterdir() if path.name not in MAY_BE_THERE) if folder.is_dir() else []
    if there or (folder.exists() and not folder.is_dir()):
        what = f"holds {', '.join(there[:5])}{' and more' if len(there) > 5 else ''}" if there else "is a file"
        raise RecipeError(f"{folder} {what}: expected an empty folder, or none. Name another one.")
    name = _package_name(name or folder.name)
    for item in SHARED:
        _copy(_shared(item), folder / item)
    workspace = folder / "workspace.yaml"
    workspace.write_text(workspace.read_text(encoding="utf-8").replace("mllm_assets", name), encoding="utf-8")
    package = folder / name
    _copy(PACKAGE / "defs", package / "defs")
    definitions = (PACKAGE / "definitions.py").read_text(encoding="utf-8")
    (package / "definitions.py").write_text(definitions.replace("mllm_assets/", f"{name}/"), encoding="utf-8")
    (package / "__init__.py").touch()
    for template in TEMPLATES:
        text = page_template("mllm_assets.project", f"{template}.jinja").render(name=name, version=__version__)
        (folder / template).write_text(f"{text}\n", encoding="utf-8")
    make_home(folder)
    return sorted(path.name for path in folder.iterdir() if path.name not in MAY_BE_THERE)


def make_home(project: Path) -> Path:
    """Dagster's folder of a project: what it keeps of runs, with the settings in it that limit the pools.

    Where DAGSTER_HOME is set, only the `dagster.yaml` in it counts.
    """
    home = project / HOME
    settings = home / "dagster.yaml"
    home.mkdir(parents=True, exist_ok=True)
    if not settings.exists():
        if (project / settings.name).is_file():
            settings.unlink(missing_ok=True)
            settings.symlink_to(Path("..", settings.name))
        else:
            _copy(_shared(settings.name), settings)
    return home


def _package_name(wanted: str) -> str:
    name = slug(wanted)
    if not name.isidentifier() or keyword.iskeyword(name):
        raise RecipeError(f"{name!r} cannot be the name of a Python package. Give one with --name, such as my_models.")
    found = importlib.util.find_spec(name)
    if found is not None and found.origin is not None:
        raise RecipeError(
            f"A package {name!r} is already installed, and the project would hide it. Give another name with --name, "
            f"such as {name}_models."
        )
    return name


def _shared(item: str) -> Path:
    packaged = PACKAGE / "project" / "shared" / item
    return packaged if packaged.exists() else PACKAGE.parent / item


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, target)
