"""Versions of a release, which of them is current, and what was done to their files."""

import json
import os
import shutil
from pathlib import Path

import pytest

from mllm_assets.cli import main
from mllm_assets.errors import IntegrityError, ModelError
from mllm_assets.layout import Layout
from mllm_assets.releases.find import find_named_model
from mllm_assets.releases.versions import (
    Release,
    current_release,
    find_release,
    list_releases,
    require_intact,
    roll_back,
)
from tests.unit.releases.test_publish import make_run, release

pytestmark = pytest.mark.not_fast


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two releases of `pets`, which each test has a copy of."""
    root = tmp_path_factory.mktemp("made")
    for i in (1, 2):
        release(make_run(root / f"run-{i}", bytes([i]) * 1000), root)
    return root


@pytest.fixture
def two(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Release]:
    """Two releases of `pets` below the environment's root."""
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(tmp_path))
    shutil.copytree(made, tmp_path, symlinks=True, dirs_exist_ok=True)
    return list_releases(Layout(tmp_path), "pets")


def current(tmp_path: Path) -> str:
    found = current_release(Layout(tmp_path), "pets")
    assert found is not None
    return found.version


def contents(releases: list[Release]) -> dict[Path, bytes]:
    return {path: path.read_bytes() for r in releases for path in r.directory.rglob("*") if path.is_file()}


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_the_newest_release_becomes_the_current_one(two: list[Release], tmp_path: Path) -> None:
    assert current(tmp_path) == "v2"
    assert (tmp_path / "releases" / "pets" / "current").resolve() == two[1].directory


def test_a_rollback_makes_an_older_version_current_and_deletes_nothing(two: list[Release], tmp_path: Path) -> None:
    before = contents(two)
    assert roll_back(Layout(tmp_path), "pets") == (two[1], two[0])
    assert current(tmp_path) == "v1"
    assert contents(two) == before
    assert list_releases(Layout(tmp_path), "pets") == two
    assert roll_back(Layout(tmp_path), "pets", "v2") == (two[0], two[1])


def test_a_rollback_stands_when_the_same_checkpoint_is_released_again(two: list[Release], tmp_path: Path) -> None:
    """A schedule would otherwise undo what a person decided, with the very model that they decided against."""
    roll_back(Layout(tmp_path), "pets")
    assert release(make_run(tmp_path / "again", bytes([2]) * 1000), tmp_path) == two[1]
    assert current(tmp_path) == "v1"


def test_the_next_version_after_a_rollback_has_a_new_number_and_is_current(two: list[Release], tmp_path: Path) -> None:
    roll_back(Layout(tmp_path), "pets")
    assert release(make_run(tmp_path / "third", b"3"), tmp_path).version == "v3" == current(tmp_path)


def test_there_is_nothing_before_the_oldest_release(two: list[Release], tmp_path: Path) -> None:
    roll_back(Layout(tmp_path), "pets", "v1")
    with pytest.raises(ModelError, match="v1 is the oldest release of pets, so there is none to go back to. "):
        roll_back(Layout(tmp_path), "pets")


def test_what_was_never_released_is_said_with_what_was(two: list[Release], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="pets has no release 'v7'. Name one of v1, v2."):
        find_release(Layout(tmp_path), "pets", "v7")
    with pytest.raises(
        ModelError, match="cats has no release .*; recipes that have one: pets. Make it: mllm-assets run"
    ):
        find_release(Layout(tmp_path), "cats")


def test_no_one_rolls_back_to_a_damaged_release(two: list[Release], tmp_path: Path) -> None:
    flip_a_bit(two[0].directory / "config.json")
    with pytest.raises(IntegrityError, match="v1 is not what was released: config.json does not match its digest"):
        roll_back(Layout(tmp_path), "pets")
    assert current(tmp_path) == "v2"


def test_a_current_that_points_nowhere_is_said_and_a_rollback_mends_it(two: list[Release], tmp_path: Path) -> None:
    (two[1].directory / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match="current points to v2, which is not a complete release. Point it to one"):
        current_release(Layout(tmp_path), "pets")
    roll_back(Layout(tmp_path), "pets", "v1")
    assert current(tmp_path) == "v1"


def test_without_a_link_the_newest_release_is_the_current_one(two: list[Release], tmp_path: Path) -> None:
    (tmp_path / "releases" / "pets" / "current").unlink()
    assert current(tmp_path) == "v2"


def test_the_files_of_a_release_are_read_only(two: list[Release]) -> None:
    modes = {path.name: path.stat().st_mode & 0o222 for path in two[0].directory.rglob("*") if path.is_file()}
    assert "manifest.json" in modes and set(modes.values()) == {0}


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "README.md", "adapter/adapter_config.json"])
def test_a_changed_bit_is_named(two: list[Release], name: str) -> None:
    path = two[0].directory / name
    if name == "manifest.json":  # it is JSON still
        path.chmod(0o644)
        path.write_text(path.read_text().replace("v1", "v9"))
    else:
        flip_a_bit(path)
    with pytest.raises(
        IntegrityError, match=f"{name} (does not match its digest|was changed). Use another release "
    ) as caught:
        require_intact(two[0].directory)
    assert "(mllm-assets releases rollback pets v2), or make a new version" in str(caught.value)


def test_where_no_release_is_sound_there_is_nothing_to_roll_back_to(two: list[Release], tmp_path: Path) -> None:
    """The suggestion named a version that the reader had to find out."""
    for one in two:
        (one.directory / "README.md").unlink()
    with pytest.raises(IntegrityError, match="No other release of it is intact; make a new .*pets/released_model"):
        require_intact(two[0].directory)
    for one in two:
        (one.directory / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match="There is none to point it to. Make one: mllm-assets run"):
        current_release(Layout(tmp_path), "pets")


def test_a_broken_current_names_the_version_to_go_to(two: list[Release], tmp_path: Path) -> None:
    (two[1].directory / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match="Point it to one that is: mllm-assets releases rollback pets v1$"):
        current_release(Layout(tmp_path), "pets")


def test_where_nothing_is_released_a_recipe_that_was_trained_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(tmp_path))
    assert main(["releases", "list"]) == 0
    assert "no recipe is there: put one into configs/." in capsys.readouterr().out
    assert os.listdir(tmp_path) == []
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cats.yaml").touch()
    (tmp_path / "outputs" / "pets" / "latest").mkdir(parents=True)
    assert main(["releases", "list"]) == 0
    assert "Make a release, for example: mllm-assets run" in (said := capsys.readouterr().out)
    assert said.rstrip().endswith("mllm-assets run pets")


def test_list_shows_each_version_which_is_current_and_which_was_changed(
    two: list[Release], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["releases", "list"]) == 0
    head, _, first, second = (line.strip() for line in capsys.readouterr().out.strip().splitlines())
    assert head.split()[:3] == ["recipe", "version", "current"] and head.endswith("where")
    assert first.split()[:2] == ["pets", "v1"] and "yes" not in first and "releases/pets/v1" in first
    assert second.split()[:3] == ["pets", "v2", "yes"]
    flip_a_bit(two[0].directory / "model.safetensors")
    assert main(["releases", "list", "pets"]) == 2
    assert "DAMAGED: model.safetensors does not match its digest" in capsys.readouterr().out.strip().splitlines()[2]
    assert main(["releases", "list", "pets", "--sizes-only"]) == 0


def test_list_as_json_is_for_programs(two: list[Release], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["releases", "list", "pets", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [(f["version"], f["is_current"], f["damage"]) for f in facts] == [("v1", False, None), ("v2", True, None)]
    assert all(f["path"] == f"releases/pets/{f['version']}" and f["num_bytes"] > 1000 for f in facts)


def test_show_says_what_a_release_was_made_from_and_how_it_was_judged(
    two: list[Release], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["releases", "show", "pets", "v1"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "pets v1\n",
        "base model  gemma3_tiny, fingerprint ffffffffffffffff, licence apache-2.0",
        "trained on  pets_train: me/pets at 1ab, digest aaaaaaaaaaaaaaaa",
        "made by     mllm-assets run pets",
        "pets_val, 6 samples; gain over the base model with its 95 % interval:\n    loss",
        "    label_accuracy      0.8333  +0.6667 (",
        "passed  beats_base_model             pets_val: the gain in loss over the base model is 2.0000",
        "passed  checkpoint_reloads_strictly  The loss on one batch is 1.500000 reloaded",
    ):
        assert text in shown
    assert main(["releases", "show", "pets", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["version"] == "v2" and facts["is_current"]
    assert facts["metrics"]["entries"]["pets_val"]["num_samples"] == 6 and facts["lineage"]["datasets"]


def test_rollback_says_what_was_and_what_is(two: list[Release], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["releases", "rollback", "pets"]) == 0
    assert capsys.readouterr().out.startswith("pets: v1 is the current release, v2 was.\n")
    assert main(["releases", "rollback", "pets", "v1"]) == 0
    assert capsys.readouterr().out == "pets: v1 is already the current release.\n"


def test_a_model_is_not_asked_through_a_release_that_was_changed(two: list[Release], tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert find_named_model("pets", layout).directory == two[1].directory
    roll_back(layout, "pets")
    assert find_named_model("pets", layout).directory == two[0].directory, "a recipe's name is its current release"
    assert find_named_model("releases/pets/current", layout).directory.resolve() == two[0].directory
    flip_a_bit(two[0].directory / "config.json")
    for name in ("pets", "pets@v1", "releases/pets/v1", "releases/pets/current"):
        with pytest.raises(IntegrityError, match="is not what was released: config.json does not match its digest"):
            find_named_model(name, layout)


def test_a_file_that_was_added_is_named(two: list[Release], tmp_path: Path) -> None:
    """A PEFT adapter beside the model is loaded with it, and the model answers otherwise."""
    (two[1].directory / "adapter_config.json").write_text("{}")
    with pytest.raises(IntegrityError, match="adapter_config.json was added"):
        require_intact(two[1].directory)
    with pytest.raises(IntegrityError, match="adapter_config.json was added"):
        roll_back(Layout(tmp_path), "pets", "v2")


@pytest.mark.parametrize("name", ["nope", "../../elsewhere"])
def test_a_rollback_of_what_does_not_exist_makes_nothing(two: list[Release], tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="has no release"):
        roll_back(Layout(tmp_path), name)
    assert not (Layout(tmp_path).releases(name)).exists()


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_a_release_without_its_manifest_is_not_asked(two: list[Release], tmp_path: Path, text: str | None) -> None:
    """It was asked as any model directory is, without a look at its files."""
    manifest = two[1].directory / "manifest.json"
    manifest.unlink()
    if text is not None:
        manifest.write_text(text)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "eval_metrics.json"):
        (copy / name).write_text("{}")
    what = {None: "manifest.json is missing", "{}": "manifest.json was changed"}
    for name in ("pets", "pets@v2", "releases/pets/v2", "releases/pets/current"):
        with pytest.raises(
            IntegrityError, match=f"(v2|current).* ({what.get(text, 'manifest.json cannot be read')}|not a complete)"
        ):
            find_named_model(name, Layout(tmp_path))
    with pytest.raises(IntegrityError, match="copy is not what was released: manifest.json is missing"):
        find_named_model("copy", Layout(tmp_path))
    assert find_named_model("pets@v1", Layout(tmp_path)).directory == two[0].directory


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_a_broken_manifest_is_listed_as_damaged_beside_the_others(
    two: list[Release], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    """It stopped the list."""
    manifest = two[0].directory / "manifest.json"
    manifest.unlink()
    if text is not None:
        manifest.write_text(text)
    for arguments in (["pets"], [], ["--sizes-only"]):
        assert main(["releases", "list", *arguments]) == 2
        _, _, first, second = (line.strip() for line in capsys.readouterr().out.strip().splitlines())
        assert first.split()[:2] == ["pets", "v1"] and "DAMAGED: manifest.json " in first
        assert second.split()[:3] == ["pets", "v2", "yes"] and "DAMAGED" not in second
    assert main(["releases", "show", "pets", "v1"]) == 2
    assert "v1 is not what was released: manifest.json" in capsys.readouterr().err
    assert main(["releases", "show", "pets"]) == 0
    third = release(make_run(tmp_path / "run-3", b"3" * 1000), tmp_path)
    assert third.version == "v3" and (two[0].directory / "config.json").is_file()


def test_a_damaged_newest_release_is_not_written_over(two: list[Release], tmp_path: Path) -> None:
    (two[1].directory / "manifest.json").unlink()
    roll_back(Layout(tmp_path), "pets", "v1")
    third = release(make_run(tmp_path / "run-3", b"3" * 1000), tmp_path)
    assert third.version == "v3" and (two[1].directory / "config.json").is_file()
