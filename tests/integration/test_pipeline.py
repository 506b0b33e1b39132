"""The whole line in a project of the user's own: real files, a real instance, the real commands."""

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from mllm_assets.artifacts import read_manifest
from mllm_assets.components.facts import facts_of
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.releases.publish import list_releases
from tests.damage import publish_changed
from tests.integration.conftest import EVERYTHING_PASSES, Project, line_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

KEYS = runpy.run_path(str(Path(__file__).parents[2] / "docs/hooks/metadata_keys.py"))
METADATA_KEYS, COST_KEYS = KEYS["METADATA_KEYS"], KEYS["COST_KEYS"]

WHERE_ASKED_FOR = {"source_listing", "eval_loss", "overrides", "mlflow_run", "wandb_run", "quantization", "cost_money",
    "line_money", "anls", "character_error_rate", "json_valid", "json_field_f1", "box_iou", "training_loss",
    # what is empty in this line is not shown
    "revision", "hub_id", "license", "reject_reasons", "flags", "unused_reasons", "augmentations", "warnings",
    "leaks", "gains_over_release", "newest", "unmatched", "answered_by"}  # fmt: skip


def config(recipe: str, **values: Any) -> dict[str, Any]:
    return {"ops": {f"{recipe}__checkpoint": {"config": values}}}


def test_a_recipe_dropped_into_configs_becomes_a_release_and_is_not_trained_twice(project: Project) -> None:
    project.write_recipe("mine", max_steps=6)
    project.set_defaults(gates=EVERYTHING_PASSES)
    project.made('+key:"mine/released_model"')
    made = project.metadata("mine", "checkpoint")
    assert made["num_steps"] == 6 and not made["already_finished"]

    [release] = list_releases(project.layout, "mine")
    scored = project.metadata("mine", "eval_metrics")
    assert scored["num_samples"] == 24 and "sacrebleu" in scored["definitions"]["bleu"]
    assert scored["confusion"].startswith("![confusion](data:image/png;base64,")
    assert "| label&#95;accuracy | " in scored["metrics"]
    assert {"config.json", "model.safetensors", "README.md", "manifest.json"} <= {
        p.name for p in release.directory.iterdir()
    }
    card = (release.directory / "README.md").read_text()
    assert "emoji_train" in card and made["fingerprint"] in card
    store = QualityStore(project.layout.quality_db)
    [counts] = store.query(
        "SELECT count(*) AS n, count(DISTINCT sample_id) AS samples FROM predictions WHERE recipe = 'mine'"
    )
    assert counts == {"n": 48, "samples": 24}
    runs = {row["asset"]: row["digest"] for row in store.query("SELECT asset, digest FROM runs")}
    assert runs["mine/released_model"] == release.digest and {"emoji/raw", "mine/checkpoint"} <= set(runs)

    made_keys = {
        key.path[-1] if key.path[0] != "pretrained" else "pretrained": key.path for key in project.made_assets()
    }
    assert len(made_keys) == 12
    for name, path in made_keys.items():
        shown, known = project.metadata(*path).keys(), (METADATA_KEYS[name] | COST_KEYS).keys()
        assert shown <= known and known - shown <= WHERE_ASKED_FOR, f"{name}: what the reference page says is {known}"

    costs_add_up(project)

    project.made('+key:"mine/released_model"')
    again = project.metadata("mine", "checkpoint")
    assert again["already_finished"] and again["fingerprint"] == made["fingerprint"]
    assert project.metadata("emoji", "sample_quality")["num_decoded"] == 0
    assert len(list_releases(project.layout, "mine")) == 1


def costs_add_up(project: Project) -> None:
    """What the assets say they took is what Dagster's clock saw of their steps, and the card's sum is theirs."""
    with dg.DagsterInstance.from_config(str(project.home)) as instance:
        stats = [step for run in instance.get_runs() for step in instance.get_run_step_stats(run.run_id)]
        made = [m for key in instance.get_asset_keys() for m in instance.fetch_materializations(key, limit=9).records]
    steps_s = sum((step.end_time or 0) - (step.start_time or 0) for step in stats)
    costs: list[dict[str, Any]] = [
        facts_of(record.asset_materialization.metadata) for record in made if record.asset_materialization
    ]
    assert 0.8 * steps_s - len(stats) < sum(cost["cost_wall_s"] for cost in costs) <= steps_s
    assert project.metadata("mine", "checkpoint")["cost_peak_memory_gib"] > 0.2, "the worker has loaded torch"
    release = project.metadata("mine", "released_model")
    for name in ("wall_s", "cpu_s"):
        of_line = sum(cost[f"cost_{name}"] for cost in costs) - release[f"cost_{name}"]
        assert release[f"line_{name}"] == pytest.approx(of_line, abs=0.01)
    assert f"| **all** | {release['line_wall_s']:.1f} | " in release["model_card"]


def test_the_counts_of_samples_add_up_in_the_metadata(project: Project) -> None:
    counts = project.metadata("emoji", "train")
    parts = ("num_train", "num_val", "num_test", "num_unused", "num_rejected")
    assert counts["num_raw"] == 800 == sum(counts[name] for name in parts)


@pytest.mark.slow
def test_stages_start_from_one_another_and_train_from_cached_features(project: Project) -> None:
    """Projector first, then the last layers, as in the guide: the second starts from the first one's weights."""
    frozen = {"freeze_vision_tower": True, "max_steps": 4}
    project.write_recipe("first", **frozen, freeze_language_model=True)
    project.write_recipe(
        "second",
        **{**frozen, "finetuning_type": "freeze", "freeze_trainable_layers": 2},
        freeze_extra_modules="multi_modal_projector,post_layernorm",
        model_name_or_path="outputs/first/latest/model",
    )
    output = project.made('+key:"second/checkpoint"')
    [warning] = project.run_manifest("second")["warnings"]
    assert "post_layernorm" in warning and warning in output, "what has no effect is said, not only kept"
    first, second = project.run_manifest("first"), project.run_manifest("second")
    assert first["caches"]["vision_features"] == second["caches"]["vision_features"] == "cached"
    assert [row["module"] for row in first["trainable"]] == ["multi_modal_projector"]
    shared = [project.metadata(recipe, "vision_features") for recipe in ("first", "second")]
    assert shared[0]["path"] == shared[1]["path"], "the same frozen tower and images share one cache"


@pytest.mark.slow
def test_the_launchpad_changes_the_run_and_its_name(project: Project) -> None:
    """Its run is not the recipe as written, so `latest` does not point to it."""
    project.write_recipe("mine")

    def run_with(**values: Any) -> dict[str, Any]:
        project.made('key:"mine/checkpoint"', config("mine", **values))
        made = project.metadata("mine", "checkpoint")
        assert made["overrides"] == values and not (project.layout.outputs / "mine" / "latest").exists()
        return json.loads((project.layout.root / made["path"] / "manifest.json").read_text())

    short = run_with(max_steps=2, learning_rate=1e-4, max_samples=16)
    assert (short["num_steps"], short["num_train_samples"], short["recipe"]["learning_rate"]) == (2, 16, 1e-4)
    epoch = run_with(num_train_epochs=1.0, max_steps=-1, max_samples=16)
    assert epoch["num_steps"] == 2 and epoch["fingerprint"] != short["fingerprint"]


@pytest.mark.slow
def test_a_trial_that_is_released_by_name_says_its_own_values(released: Project) -> None:
    """Its card had the file's recipe, and the command that makes another model."""
    released.made(line_of("mine"), config("mine", max_steps=1, other={"default_system": "Be brief."}))
    card = (released.layout.releases("mine") / "v2" / "README.md").read_text()
    assert "mllm-assets run mine/released_model 'default_system=Be brief.' max_steps=1" in card
    assert "default_system: Be brief." in card and "max_steps: 1\n" in card


@pytest.mark.slow
def test_a_failed_gate_stops_the_release_also_when_it_is_materialised_alone(project: Project) -> None:
    project.write_recipe("weak", max_steps=1)
    project.set_defaults(gates={"min_answer_gain": 0.5})
    line = project.materialize(line_of("weak"))
    output, _ = line.communicate(timeout=500)
    assert line.returncode == 1 and "beats_most_common_answer" in output

    alone = project.materialize('key:"weak/released_model"')
    output, _ = alone.communicate(timeout=500)
    assert alone.returncode == 1
    assert "weak is not released" in output and "Train longer or on more data" in output
    assert list_releases(project.layout, "weak") == []


@pytest.mark.slow
def test_the_summary_never_shows_one_runs_metrics_beside_another_run(released: Project) -> None:

    def summary(*overrides: str) -> str:
        output, _ = released.start("mllm_assets.cli", "summary", "mine", *overrides).communicate(timeout=500)
        return output

    assert "label_accuracy" in summary() and "releases/mine/v1, made from this run" in summary()
    trial = released.start("mllm_assets.cli", "train", "configs/mine.yaml", "max_steps=1")
    output, _ = trial.communicate(timeout=500)
    assert trial.returncode == 0, output
    assert "mllm-assets summary mine max_steps=1" in output
    assert "trained     2 steps" in summary() and "releases/mine/v1, made from this run" in summary()
    after = summary("max_steps=1")
    assert after.strip().startswith("mine max_steps=1\n") and "trained     1 steps" in after
    assert "none yet of this run" in after and "label_accuracy" not in after
    assert "made from another run" in after and "What kind of emoji is this?" in after


@pytest.mark.slow
def test_metrics_of_another_checkpoint_or_of_other_data_release_nothing(released: Project) -> None:
    """The gates were passed by the old weights: the new ones would have slipped past on their figures."""
    shutil.rmtree(released.layout.releases("mine"))
    test = released.layout.data / "emoji" / "test.json"
    judged_on = test.read_text()
    test.write_text(json.dumps(json.loads(judged_on)[1:]))
    publish_changed(test.parent)
    output, _ = released.materialize('key:"mine/released_model"').communicate(timeout=500)
    assert "no_leakage: emoji_test is not what the model was evaluated on any more" in output
    test.write_text(judged_on)
    publish_changed(test.parent)
    released.made('key:"mine/checkpoint"', config("mine", max_steps=3))
    for selection in ('key:"mine/released_model"', 'key:"mine/eval_metrics" or key:"mine/released_model"'):
        run = released.materialize(selection)
        output, _ = run.communicate(timeout=500)
        assert run.returncode == 1, output
        assert "the metrics are of other weights" in output and "Materialise predictions and eval_metrics" in output
    assert list_releases(released.layout, "mine") == []


def test_an_asset_whose_inputs_were_never_made_says_the_command_that_makes_them(project: Project) -> None:
    project.write_recipe("mine")
    run = project.materialize('key:"mine/eval_metrics"')
    output, _ = run.communicate(timeout=500)
    assert run.returncode == 1
    assert "mine/predictions was never materialised. Run: mllm-assets run mine/predictions" in output


@pytest.mark.slow
def test_the_run_directory_says_all_that_the_guide_looks_at(project: Project) -> None:
    project.write_recipe("mine", plot_loss=True, max_steps=6, eval_strategy="steps", eval_steps=3, max_samples=16)
    project.made('key:"mine/checkpoint"')
    run_dir = project.layout.outputs / "mine" / "latest"
    assert {p.name for p in run_dir.iterdir()} >= {
        "model", "checkpoint-3", "checkpoint-6", "trainer_log.jsonl", "logs", "training_loss.png", "manifest.json"
    }  # fmt: skip
    assert list((run_dir / "logs").glob("events.out.tfevents.*"))
    last = json.loads((run_dir / "trainer_log.jsonl").read_text().splitlines()[-1])
    assert {"current_steps", "total_steps", "epoch", "percentage", "elapsed_time", "remaining_time"} <= set(last)
    assert read_manifest(run_dir)["eval_loss"] > 0
