"""From what a person calls a model to its directory."""

import json
from pathlib import Path

import pytest

from mllm_assets.artifacts import write_manifest
from mllm_assets.errors import ModelError
from mllm_assets.layout import Layout
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.releases.find import find_named_model
from mllm_assets.releases.versions import seal

RECIPE = {"template": "qwen3_vl", "enable_thinking": False, "image_max_pixels": 4096, "media_dir": "photos"}


def make_model(directory: Path, manifest: dict | None = None) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    if manifest is not None:
        write_manifest(directory, manifest)
    return directory


def make_run(layout: Layout, recipe: str, name: str = "abc") -> Path:
    run = layout.outputs / recipe / name
    make_model(run / "model")
    (run / "checkpoint-40").mkdir()
    write_manifest(run, {"recipe": RECIPE})
    (layout.outputs / recipe / "latest").symlink_to(name)
    return run


def make_release(layout: Layout, recipe: str, version: str) -> Path:
    directory = make_model(layout.releases(recipe) / version)
    seal(directory, {"recipe": recipe, "version": version, "digest": version, "lineage": {"recipe": RECIPE}})
    return directory


def test_a_recipe_is_its_latest_run_until_something_of_it_is_released(layout: Layout) -> None:
    run = make_run(layout, "birds")
    assert find_named_model("birds", layout).directory == layout.outputs / "birds" / "latest" / "model"
    assert find_named_model("birds@checkpoint-40", layout).directory.resolve() == run / "checkpoint-40"
    first = make_release(layout, "birds", "v1")
    newest = make_release(layout, "birds", "v2")
    assert find_named_model("birds", layout).directory == newest
    assert find_named_model("birds@v1", layout).directory == first


def test_paths_may_be_relative_to_the_project(layout: Layout) -> None:
    run = make_run(layout, "birds")
    for name in (str(run), "outputs/birds/abc", "outputs/birds/latest/model"):
        assert find_named_model(name, layout).directory.resolve() == run / "model"
    base = make_model(layout.pretrains / "tiny")
    assert find_named_model("pretrained/tiny", layout).directory == base
    assert find_named_model("pretrains/tiny", layout).directory == base


def test_a_model_is_asked_in_the_turn_format_that_it_was_trained_in(layout: Layout) -> None:
    """A reasoning model answered in the format of one that does not reason, because its run was not asked."""
    make_run(layout, "birds")
    unfinished = layout.outputs / "fish" / "def"
    (unfinished / "checkpoint-2").mkdir(parents=True)
    (unfinished / "run.json").write_text(json.dumps({"starts_from": {"recipe": RECIPE}}))
    (layout.outputs / "fish" / "latest").symlink_to("def")
    make_release(layout, "released", "v1")
    for name in ("birds", "birds@checkpoint-40", "outputs/fish/def/checkpoint-2", "released@v1"):
        model = find_named_model(name, layout)
        turns = model.turns
        assert (turns.template, turns.enable_thinking, turns.image_max_pixels) == ("qwen3_vl", False, 4096), name
        assert model.media_dir == "photos", name
    base = find_named_model(make_model(layout.pretrains / "tiny"), layout)
    assert base.turns == TurnSettings()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "bird",
            r"bird is neither a directory nor a recipe with a finished run below .*Did you mean birds\? Give a mod",
        ),
        ("birds@v3", r"birds has no release 'v3' in .*releases/birds. There is birds@v1, birds@v2.$"),
        ("fish@v1", r"fish has no release 'v1' in .* Nothing of it is released yet."),
        (
            "birds@checkpoint-7",
            r"birds@checkpoint-7 is not there: .* no folder 'checkpoint-7'. There is checkpoint-40.",
        ),
        ("pretrained/big", r"pretrained/big is not there: .*pretrains has no folder 'big'. There is tiny."),
        ("no/checkpoint-4", r"no/checkpoint-4 does not exist. Give a model directory"),
        ("no/where", r"no/where does not exist. Give a model directory"),
        ("notes.txt", r"notes.txt is a file, not a model directory. Give a model or run directory, checkpoint-<step>"),
        ("outputs", r"outputs is not a model directory: it has neither config.json nor model/config.json."),
    ],
)
def test_what_is_no_model_is_named_with_what_there_is(layout: Layout, name: str, message: str) -> None:
    make_run(layout, "birds")
    make_release(layout, "birds", "v1")
    make_release(layout, "birds", "v2")
    make_model(layout.pretrains / "tiny")
    (layout.root / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=message):
        find_named_model(name, layout)


def test_a_checkpoint_of_a_recipe_without_latest_says_why_and_what_to_run(layout: Layout) -> None:
    """It said that the folder `latest`, which is not there, holds no checkpoint-400."""
    run = make_run(layout, "birds")
    (run.parent / "latest").unlink()
    with pytest.raises(ModelError, match=r"latest is missing; finished runs: abc\. .*mllm-assets run birds/checkpoint"):
        find_named_model("birds@checkpoint-400", layout)
