"""The gates on the emoji data, as Dagster runs them: they pass for the shipped recipe, and fail on five broken ones.

Each broken one fails for a reason of its own.
"""

import importlib.util
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from mllm_assets.evaluation.gates import APPROVAL, FORGETS, GATES, KEEPS
from mllm_assets.evaluation.metrics import read_metrics
from mllm_assets.releases.versions import current_release, list_releases, require_intact
from tests.damage import publish_changed
from tests.integration.conftest import REPOSITORY, Project, copied_project, line_of

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(2400)]

SHORT = {"per_device_train_batch_size": 16, "learning_rate": 6.0e-4, "max_steps": 40}


@pytest.fixture(scope="module")
def gated(emoji_ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """One project for the file: what is made for one recipe is there for the next."""
    with copied_project(emoji_ready, tmp_path_factory.mktemp("gates") / "project") as project:
        yield project


def write_broken(project: Project, name: str, **values: Any) -> None:
    """A recipe whose answers are cut after 16 tokens, more than any right one has: some of its models never end one."""
    project.write_recipe(name, **values)
    set_for(project, name, evaluation={"max_new_tokens": 16})


def set_for(project: Project, recipe: str, **settings: Any) -> None:
    path = project.root / project.package / "defs" / "recipes" / "defs.yaml"
    component = yaml.safe_load(path.read_text())
    component["attributes"].setdefault("settings", []).append({"recipe": recipe, **settings})
    path.write_text(yaml.safe_dump(component))


def run(project: Project, selection: str) -> tuple[int, str]:
    process = project.materialize(selection)
    output, _ = process.communicate(timeout=1200)
    return process.returncode, output


def judged(project: Project, recipe: str) -> dict[str, tuple[bool, str]]:
    """Whether each gate passed when it was last checked, and why."""
    found: dict[str, tuple[bool, str]] = {}
    with dg.DagsterInstance.from_config(str(project.home)) as instance:
        for name in GATES.keys() - {APPROVAL, FORGETS, KEEPS}:  # which no recipe here asks for
            asset = "checkpoint" if name == "checkpoint_reloads_strictly" else "eval_metrics"
            key = dg.AssetCheckKey(dg.AssetKey([recipe, asset]), name)
            [record] = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
            assert record.event is not None and record.event.dagster_event is not None
            evaluation: Any = record.event.dagster_event.event_specific_data
            found[name] = (evaluation.passed, evaluation.description)
    return found


def failed(project: Project, recipe: str) -> dict[str, str]:
    """The failed gates of a recipe, which must have no release, and their reasons."""
    assert list_releases(project.layout, recipe) == []
    return {name: reason for name, (passed, reason) in judged(project, recipe).items() if not passed}


def write_entry(project: Project, name: str, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """An entry made by hand from the training entry of the emoji dataset."""
    info_path = project.layout.dataset_info
    info = json.loads(info_path.read_text())
    entry = info["emoji_train"]
    rows = json.loads((project.layout.data / entry["file_name"]).read_text())
    change(rows)
    (project.layout.data / f"{name}.json").write_text(json.dumps(rows))
    info_path.write_text(json.dumps({**info, name: {**entry, "file_name": f"{name}.json"}}))


@pytest.fixture(scope="module")
def shipped(gated: Project) -> Project:
    """The same project, in which the shipped recipe was released."""
    shutil.copy(REPOSITORY / "configs" / "emoji_sft.yaml", gated.root / "configs")
    code, output = run(gated, line_of("emoji_sft"))
    assert code == 0, output
    return gated


@pytest.fixture(scope="module")
def broken(gated: Project) -> Project:
    """The same project, in which three broken recipes were run to their ends, in one run."""
    write_broken(gated, "untrained", max_steps=1, learning_rate=1.0e-12)
    write_entry(gated, "shuffled_train", shuffle_images)
    write_broken(gated, "shuffled", dataset="shuffled_train", **SHORT)
    write_entry(gated, "constant_train", repeat_most_common_answer)
    write_broken(gated, "constant", dataset="constant_train", **SHORT)
    code, output = run(gated, " or ".join(line_of(recipe) for recipe in ("untrained", "shuffled", "constant")))
    assert code == 1, output
    return gated


def shuffle_images(rows: list[dict[str, Any]]) -> None:
    images = [row["images"] for row in rows]
    random.Random(0).shuffle(images)
    for row, others in zip(rows, images, strict=True):
        row["images"] = others


def repeat_most_common_answer(rows: list[dict[str, Any]]) -> None:
    answers = [row["messages"][-1]["content"] for row in rows]
    most_common = max(sorted(set(answers)), key=answers.count)
    for row in rows:
        row["messages"][-1]["content"] = most_common


def test_the_shipped_recipe_passes_every_gate_and_is_released(shipped: Project) -> None:
    outcome = judged(shipped, "emoji_sft")
    assert all(passed for passed, _ in outcome.values()), outcome
    release = current_release(shipped.layout, "emoji_sft")
    assert release is not None and release.version == "v1"
    require_intact(release.directory)
    measured = read_metrics(release.directory)["forgetting"]["plain_questions"]
    assert measured["num_samples"] == 32 and "### What it forgot" in (release.directory / "README.md").read_text()


def test_a_dry_push_lists_what_would_go_to_the_hub(shipped: Project) -> None:
    set_for(shipped, "emoji_sft", push_to_hub={"repo_id": "me/emoji"})
    code, output = run(shipped, 'key:"emoji_sft/hub_model"')
    assert code == 0 and "Dry run: nothing was sent. push_to_hub.dry_run: false pushes to me/emoji." in output
    facts = shipped.metadata("emoji_sft", "hub_model")
    assert facts["dry_run"] and facts["private"] and (facts["repo_id"], facts["version"]) == ("me/emoji", "v1")
    names = {record.data["file"] for record in facts["files"].records}
    assert {"README.md", "config.json", "model.safetensors"} <= names and "predictions.parquet" not in names


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_a_release_goes_into_mlflows_registry_with_its_line_and_a_trial_does_not(shipped: Project) -> None:
    set_for(shipped, "emoji_sft", mlflow_registry={})
    code, output = run(shipped, 'key:"emoji_sft/mlflow_model"')
    facts = shipped.metadata("emoji_sft", "mlflow_model")
    assert code == 0, output
    assert (facts["registered_as"], facts["alias"]) == ("models:/emoji_sft/1", "champion")
    assert (shipped.root / facts["registry"]).is_file()
    trial, _ = shipped.start("mllm_assets.cli", "run", "emoji_sft", "max_steps=3", "--dry-run").communicate(timeout=300)
    assert "emoji_sft/eval_metrics" in trial and "mlflow_model" not in trial and "released_model" not in trial, trial


def test_a_corrupted_checkpoint_is_not_released_and_is_finished_again(shipped: Project) -> None:
    """It was finished once, so nothing trains again; its files are looked at all the same."""
    weights = shipped.layout.outputs / "emoji_sft" / "latest" / "model" / "model.safetensors"
    trained = weights.read_bytes()
    damaged = bytearray(trained)
    damaged[len(damaged) // 2] ^= 1
    weights.unlink()  # the release shares its blocks
    weights.write_bytes(damaged)
    code, output = run(shipped, 'key:"emoji_sft/released_model"')
    assert code == 1 and "model/model.safetensors" in output, output
    code, output = run(shipped, 'key:"emoji_sft/checkpoint"')
    assert code == 0, output
    assert weights.read_bytes() == trained
    passed, reason = judged(shipped, "emoji_sft")["checkpoint_reloads_strictly"]
    assert passed, reason
    [release] = list_releases(shipped.layout, "emoji_sft")
    require_intact(release.directory)


def test_an_untrained_model_does_not_beat_its_base_model(broken: Project) -> None:
    gates = failed(broken, "untrained")
    assert "the gain in loss over the base model is 0.0000 (95 % interval" in gates["beats_base_model"]
    assert "checkpoint_reloads_strictly" not in gates and "no_leakage" not in gates


def test_a_model_trained_on_shuffled_images_does_not_use_the_image(broken: Project) -> None:
    gates = failed(broken, "shuffled")
    assert "gain in loss of the sample's own image over another's is" in gates["the_model_uses_the_image"]
    assert not {"beats_base_model", "checkpoint_reloads_strictly", "no_leakage"} & gates.keys()


def test_a_model_with_one_constant_answer_does_not_beat_it(broken: Project) -> None:
    gates = failed(broken, "constant")
    reason = gates["beats_most_common_answer"]
    assert "gain in label_accuracy over always answering" in reason and "is 0.0000 (95 % interval 0.0000" in reason
    assert not {"checkpoint_reloads_strictly", "no_leakage"} & gates.keys()


def test_a_model_that_trained_on_validation_images_is_not_released(project: Project) -> None:
    """Its dataset's own file was changed after the split was checked."""
    folder = (project.layout.data / "emoji").resolve()
    rows, held = (json.loads((folder / name).read_text()) for name in ("train.json", "val.json"))
    (folder / "train.json").write_text(json.dumps(rows + held[:20]))
    publish_changed(folder)
    write_broken(project, "leaked", max_steps=1)
    code, output = run(project, line_of("leaked"))
    assert code == 1, output
    gates = failed(project, "leaked")
    assert gates["no_leakage"].startswith("20 ") and "set `allow_leakage: true`" in gates["no_leakage"]
    assert "checkpoint_reloads_strictly" not in gates
    code, output = run(project, 'key:"leaked/released_model"')
    assert code == 1 and "leaked is not released:" in output and "no_leakage: 20 " in output
