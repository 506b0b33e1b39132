"""The layout keeps itself: no import runs upward or in a circle, and torch stays in its rooms."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("house", REPOSITORY / "docs" / "hooks" / "house.py")
assert SPEC and SPEC.loader
house = importlib.util.module_from_spec(SPEC)
sys.modules["house"] = house  # dataclasses look there
SPEC.loader.exec_module(house)

PACKAGE = REPOSITORY / "mllm_assets"


@pytest.fixture(scope="module")
def ours() -> Any:
    return house.read_house(PACKAGE)


def write(package: Path, **texts: str) -> Path:
    """A package of these files, `training__loop__a` being `training/loop/a.py`."""
    for name, text in texts.items():
        path = (package / name.replace("__", "/")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


def test_no_import_runs_upward_or_in_a_circle(ours: Any) -> None:
    assert house.violations(ours) == []


@pytest.mark.parametrize(
    "statement",
    [
        "from mllm_assets.data.curate import splits",
        "import mllm_assets.data.curate.splits",
        "from mllm_assets.data.curate.splits import split",
        "def late():\n    from mllm_assets.data.curate.splits import split",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mllm_assets.data.curate.splits import split",
    ],
)
def test_an_import_that_runs_upward_is_named_with_both_files(tmp_path: Path, statement: str) -> None:
    package = write(tmp_path / "mllm_assets", data__curate__splits="", hub__client=statement)
    (found,) = house.violations(house.read_house(package))
    assert f"hub/client.py:{statement.count(chr(10)) + 1} imports data/curate/splits.py" in found
    assert "hub lies below data.curate" in found


def test_an_import_that_runs_downward_is_fine(tmp_path: Path) -> None:
    package = write(
        tmp_path / "mllm_assets",
        data__curate__splits="from mllm_assets.hub import client\nfrom mllm_assets import errors",
        hub__client="import os",
        errors="",
    )
    assert house.violations(house.read_house(package)) == []


def test_a_circle_is_named_with_its_files(tmp_path: Path) -> None:
    package = write(
        tmp_path / "mllm_assets",
        hub__a="from mllm_assets.hub import b",
        hub__b="def late():\n    import mllm_assets.hub.c",
        hub__c="from mllm_assets.hub.a import x",
        hub__d="from mllm_assets.hub import a",
    )
    (found,) = house.violations(house.read_house(package))
    assert found.startswith("hub/a.py -> hub/b.py -> hub/c.py -> hub/a.py: a circle.")


def test_a_folder_that_is_on_no_floor_is_named(tmp_path: Path) -> None:
    package = write(tmp_path / "mllm_assets", hub__client="", attic__box="from mllm_assets.hub import client")
    assert house.violations(house.read_house(package)) == [
        "attic/box.py:1: attic is not a room. Add it to ROOMS, on its floor."
    ]


def test_every_room_exists_and_every_folder_is_a_room(ours: Any) -> None:
    found = {house.room_of(path) for path, lines in ours.num_lines.items() if lines}
    assert found == set(house.ROOMS)


def test_torch_is_imported_only_where_five_globs_of_pyproject_allow_it(ours: Any) -> None:
    """Inside functions too: ruff looks at the top of a file only."""
    globs = house.torch_globs(REPOSITORY / "pyproject.toml")
    matched = [house.matched(glob, REPOSITORY) for glob in globs]
    assert 1 <= len(globs) <= 5 and all(matched)
    elsewhere = ours.heavy - set().union(*matched)
    assert {path.as_posix() for path in elsewhere} == set(house.LATE_IMPORTS)


def test_torch_inside_a_function_is_seen(tmp_path: Path) -> None:
    package = write(
        tmp_path / "mllm_assets", hub__a="def late():\n    from torch.nn import Linear", hub__b="import json"
    )
    assert house.read_house(package).heavy == {Path("hub/a.py")}


def test_no_test_of_make_test_fast_imports_torch_at_its_top() -> None:
    """`make test-newest` runs them where torch is not installed."""
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    ((prefix, folders, files),) = re.findall(
        r"^TORCH_UNITS := \$\(addprefix (\S+?),(.+?)\)(.+)$", makefile, re.MULTILINE
    )
    ignored = (*(prefix + folder for folder in folders.split()), *files.split())
    units = REPOSITORY / "tests" / "unit"
    importing = {
        path.relative_to(units).as_posix()
        for path in units.rglob("test_*.py")
        if re.search(r"^(import|from) (torch|accelerate|peft)\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert importing
    assert [name for name in sorted(importing) if not name.startswith(ignored)] == []


def test_the_drawing_shows_every_room_with_its_size_and_imports(ours: Any) -> None:
    drawn = house.drawing(ours)
    for room in house.rooms(ours):
        assert f"<small>{room.size}" in drawn and f"<tr><th>{room.name}</th>" in drawn
    assert sum(room.num_lines for room in house.rooms(ours)) == sum(ours.num_lines.values())
    for (source, target), count in house.room_imports(ours).items():
        assert f'title="{source} imports {target}: {count}">{count}</td>' in drawn
    assert "<!-- the house -->" in (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
