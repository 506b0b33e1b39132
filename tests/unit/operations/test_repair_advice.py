"""What `doctor --repair` advises can be typed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mllm_assets.artifacts import MANIFEST, is_sound, write_manifest
from mllm_assets.errors import IntegrityError
from mllm_assets.layout import Layout
from mllm_assets.operations.artefacts import find_artefacts, find_kept
from mllm_assets.operations.repair import find_damages, repair
from mllm_assets.training.runs.run_file import RUN_FILE, read_run_file, read_starting_model
from tests.damage import DAMAGES, OTHER_KINDS

# a folder of each kind that is kept, and the file in it that is damaged
ARTEFACTS = {
    "outputs/mine/0123456789abcdef": "model/model.safetensors",
    "outputs/mine/0123456789abcdef/checkpoint-2": "trainable.safetensors",
    "outputs/mine/predictions/0123456789abcdef": "predictions.parquet",
    "outputs/mine/eval_metrics/0123456789abcdef": "eval_metrics.json",
    "data/.versions/birds/0123456789abcdef": "train.json",
    "data/.quality/birds/0123456789abcdef": "quality.parquet",
    "data/.raw/birds/0123456789abcdef": "samples.parquet",
    "data/.history/birds/0123456789abcdef": "rows.parquet",
    "cache/features/0123456789abcdef/00": "tensors.safetensors",
    "cache/hidden_states/0123456789abcdef/00": "tensors.safetensors",
    "pretrains/tiny": "model.safetensors",
    "releases/mine/v1": "model.safetensors",
}
# what an unfinished run is, a model that its user put there, and a folder that is no release
WITHOUT_MANIFEST = ("outputs/mine/0123456789abcdef", "pretrains/tiny", "releases/mine/v1")


def test_a_split_is_made_again_with_the_one_that_is_made_beside_it(layout: Layout) -> None:
    """Dagster refuses a selection of one: the advice led to an error."""
    layout.data.mkdir()
    (layout.data / "sides").symlink_to(Path(".versions", "sides", "gone"))
    [damage] = find_damages(layout)
    assert "mllm-assets run sides/train" in damage.cure


def test_entries_that_could_not_be_written_again_are_not_said_to_be_back(layout: Layout) -> None:
    layout.data.mkdir()
    layout.dataset_info.write_text('{"cut": ')
    [finding] = repair(layout)
    assert "no dataset here has splits to write entries of" in finding.detail
    assert not layout.dataset_info.exists() or json.loads(layout.dataset_info.read_text()) == {}


@pytest.mark.attack("damage")
@pytest.mark.parametrize(
    "content", [b"", b'{"starts_from": ', b"[]", b"\xff\xfe", b"[" * 100_000], ids=lambda b: str(b[:9])
)
def test_a_damaged_file_of_what_a_run_began_with_is_named_and_moved_away(layout: Layout, content: bytes) -> None:
    """A cut one ended each start of the run in a traceback of the JSON reader."""
    run = layout.outputs / "mine" / "0123456789abcdef"
    run.mkdir(parents=True)
    (run / RUN_FILE).write_bytes(content)
    with pytest.raises(IntegrityError, match=r"run.json.*Run: mllm-assets doctor --repair"):
        read_run_file(run)
    assert find_kept(layout, find_artefacts(layout), keep_runs=1)
    [finding] = repair(layout)
    assert "run mine/checkpoint" in finding.next_step and finding.detail.startswith("outputs/mine/0123456789abcdef/run")
    assert read_run_file(run) == {} and find_artefacts(layout)


@pytest.mark.attack("damage")
@pytest.mark.parametrize("recipe", [None, [], {}, {"zzz": 1}, {"model_name_or_path": []}], ids=str)
def test_a_run_that_began_with_no_recipe_says_so(layout: Layout, recipe: object) -> None:
    run, model = layout.outputs / "mine" / "0123456789abcdef", layout.pretrains / "m"
    for folder in (run, model):
        folder.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    starts_from = {"model_dir": "../../../pretrains/m", "fingerprint": "x", "recipe": recipe}
    (run / RUN_FILE).write_text(json.dumps({"starts_from": starts_from}))
    with pytest.raises(IntegrityError, match="does not say what it was trained with"):
        read_starting_model(run)


@pytest.mark.attack("damage")
@pytest.mark.parametrize("damage", {**DAMAGES, **OTHER_KINDS}.values(), ids=[*DAMAGES, *OTHER_KINDS])
@pytest.mark.parametrize("folder", ARTEFACTS)
def test_each_damaged_file_of_each_artefact_is_named(layout: Layout, folder: str, damage: Callable) -> None:
    """A folder or a link in the place of a manifest ended `doctor` in the system's own error."""
    for name in (ARTEFACTS[folder], MANIFEST):
        place = layout.root / folder
        place.mkdir(parents=True, exist_ok=True)
        path = place / ARTEFACTS[folder]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        write_manifest(place, {"recipe_name": "mine"})
        assert is_sound(place) and [found.status for found in repair(layout)] == ["ok"]
        damage(place / name)
        assert not is_sound(place)
        found = [item.path for item in find_damages(layout) if item.path in (place, place / name)]
        assert len(found) == 1 or (name == MANIFEST and folder in WITHOUT_MANIFEST), found
        repair(layout)
        shutil.rmtree(layout.root)
        layout.root.mkdir()


@pytest.mark.attack("damage")
@pytest.mark.parametrize("damage", OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_what_a_run_began_with_is_a_file(layout: Layout, damage: Callable) -> None:
    """A folder in its place counted as an older run's nothing, and was not written over either."""
    run = layout.outputs / "mine" / "0123456789abcdef"
    run.mkdir(parents=True)
    (run / RUN_FILE).write_text("{}")
    damage(run / RUN_FILE)
    with pytest.raises(IntegrityError, match=r"run.json cannot be read .*Run: mllm-assets doctor --repair"):
        read_run_file(run)
    [finding] = repair(layout)
    assert "run.json" in finding.detail and read_run_file(run) == {}
