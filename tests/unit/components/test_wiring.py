"""Edges come from the recipes' own keys."""

from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from mllm_assets.components.assets.lineage import as_trained
from mllm_assets.components.wiring import KnownAssets, Settings, chains_of, external_entries, resolve, split_cycles
from mllm_assets.errors import RecipeError
from mllm_assets.recipe.load import Recipe, load_recipe

KNOWN_ASSETS = KnownAssets(
    entries={
        "emoji_train": dg.AssetKey(["emoji", "dataset_info"]),
        "emoji_val": dg.AssetKey(["emoji", "dataset_info"]),
    },
    models={"pretrains/gemma3_tiny": dg.AssetKey(["pretrained", "gemma3_tiny"])},
    recipes={"outputs/first": dg.AssetKey(["first", "checkpoint"])},
)


def write_recipe(folder: Path, name: str = "mine", **values: str) -> Recipe:
    keys = {
        "model_name_or_path": "pretrains/gemma3_tiny",
        "stage": "sft",
        "do_train": "true",
        "finetuning_type": "full",
        "dataset": "emoji_train",
        "eval_dataset": "emoji_val",
        "template": "gemma3",
        "output_dir": f"outputs/{name}",
        **values,
    }
    path = folder / f"{name}.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    return load_recipe(path)


def test_an_entry_leads_to_the_dataset_that_writes_it(tmp_path: Path) -> None:
    node = resolve(write_recipe(tmp_path), KNOWN_ASSETS)
    assert node.data == [dg.AssetKey(["emoji", "dataset_info"])]
    assert node.model == dg.AssetKey(["pretrained", "gemma3_tiny"])


def test_benchmarks_are_part_of_the_line_only_where_a_gate_looks_at_them(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    asked = {"benchmarks": {"tasks": ["faces"]}, "gates": {"max_benchmark_loss": 0.02}}
    assert resolve(recipe, KNOWN_ASSETS, Settings.model_validate(asked)).judged_by_benchmarks == [
        dg.AssetKey(["mine", "benchmarks"])
    ]
    for name in asked:
        settings = Settings.model_validate({key: value for key, value in asked.items() if key != name})
        assert resolve(recipe, KNOWN_ASSETS, settings).judged_by_benchmarks == []
    with pytest.raises(RecipeError, match="benchmarks: tasks names"):
        resolve(recipe, KNOWN_ASSETS, Settings.model_validate({"benchmarks": {"tasks": ["--limit"]}}))


def test_what_forgetting_is_measured_on_leads_to_the_dataset_that_writes_it(tmp_path: Path) -> None:
    """Without the edge it was read as it happened to be, or found missing after the training."""
    recipe = write_recipe(tmp_path)
    settings = Settings.model_validate({"evaluation": {"unrelated": ["plain_questions", "emoji_val"]}})
    node = resolve(recipe, KNOWN_ASSETS, settings)
    assert node.unrelated_data == {"emoji_val": dg.AssetKey(["emoji", "dataset_info"])}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluation": {"unrelated": ["plain_question"]}}, "evaluation.unrelated names 'plain_question', which no"),
        ({"evaluation": {"unrelated": ["emoji_train"]}}, "evaluation.unrelated names emoji_train, which the recipe"),
        ({"evaluation": {"temperature": -1.0}}, "evaluation.temperature is -1.0"),
        ({"gates": {"max_regression_nats": -1.0}}, "max_regression_nats is -1.0"),
        ({"mlflow_registry": {"alias": "v2"}}, "mlflow_registry.alias is 'v2'"),
        ({"push_to_hub": {"repo_id": "mine"}}, "push_to_hub.repo_id is 'mine'"),
        ({"sweep": {"parameters": {}}}, "sweep: parameters is empty"),
    ],
)
def test_a_setting_that_is_not_valid_is_that_of_one_recipe(tmp_path: Path, settings: dict, message: str) -> None:
    """It was raised while the graph was built, and ended every other recipe's commands too."""
    with pytest.raises(RecipeError, match=message):
        resolve(write_recipe(tmp_path), KNOWN_ASSETS, Settings.model_validate(settings))


def test_the_stage_decides_what_a_model_is_judged_by_unless_the_settings_do(tmp_path: Path) -> None:
    nodes = {
        stage: resolve(write_recipe(tmp_path, stage, stage=stage), KNOWN_ASSETS) for stage in ("sft", "dpo", "kto")
    }
    assert {stage: node.gates.beats_base_by for stage, node in nodes.items()} == {
        "sft": "loss",
        "dpo": "answers",
        "kto": "answers",
    }
    settings = Settings.model_validate({"gates": {"beats_base_by": "loss", "min_loss_gain_nats": -0.5}})
    chosen = replace(nodes["dpo"], settings=settings).gates
    assert (chosen.beats_base_by, chosen.min_loss_gain_nats) == ("loss", -0.5)
    unset = Settings.model_validate({"gates": {"beats_base_by": None}})
    assert replace(nodes["dpo"], settings=unset).gates.beats_base_by == "answers"


def test_an_output_of_another_recipe_leads_to_its_checkpoint(tmp_path: Path) -> None:
    first = resolve(write_recipe(tmp_path, "first"), KNOWN_ASSETS)
    second = resolve(write_recipe(tmp_path, "second", model_name_or_path="outputs/first/latest/model"), KNOWN_ASSETS)
    assert second.model == dg.AssetKey(["first", "checkpoint"])
    assert chains_of([first, second]) == {"first": ["first", "second"]}


def test_a_model_of_no_described_family_has_no_asset_of_features(tmp_path: Path) -> None:
    """They are not cached, and the asset could only fail: `freeze_vision_tower` is true where nothing is said."""
    assert resolve(write_recipe(tmp_path), KNOWN_ASSETS).has_features
    assert not resolve(write_recipe(tmp_path, template="auto"), KNOWN_ASSETS).has_features


def test_an_unknown_dataset_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"mine\.yaml: dataset names 'emoji_trian'.*Did you mean 'emoji_train'\?"):
        resolve(write_recipe(tmp_path, dataset="emoji_trian"), KNOWN_ASSETS)


def test_an_unknown_model_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"'pretrains/gemma', which no asset makes\. Known models: pretrains/gemma3_tiny"
    ):
        resolve(write_recipe(tmp_path, model_name_or_path="pretrains/gemma"), KNOWN_ASSETS)


def test_a_recipe_cannot_start_from_its_own_output(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "first", model_name_or_path="outputs/first/latest/model")
    with pytest.raises(RecipeError, match="is the recipe's own output"):
        resolve(recipe, KNOWN_ASSETS)


def test_recipes_that_start_from_one_another_in_a_circle_are_refused_by_name(tmp_path: Path) -> None:
    """Following their models never ended, and with it the loading of the code location."""
    known_assets = replace(
        KNOWN_ASSETS, recipes={f"outputs/{n}": dg.AssetKey([n, "checkpoint"]) for n in ("a", "b", "c")}
    )
    models = {"a": "outputs/b", "b": "outputs/a/latest/model", "c": "outputs/a"}
    nodes = [resolve(write_recipe(tmp_path, name, model_name_or_path=m), known_assets) for name, m in models.items()]
    sound, circular = split_cycles(nodes)
    assert [node.name for node in sound] == ["c"]
    assert {node.name for node, _ in circular} == {"a", "b"}
    assert "a.yaml: model_name_or_path leads back to the recipe itself (a <- b <- a)" in str(circular[0][1])
    assert chains_of(sound) == {"c": ["c"]}


def test_a_recipe_knows_what_the_stages_before_it_train_on(tmp_path: Path) -> None:
    """Another machine must have that data too, to see whether it is evaluated on."""
    others = {name: dg.AssetKey([name, "dataset_info"]) for name in ("x", "y")}
    recipes = {f"outputs/{n}": dg.AssetKey([n, "checkpoint"]) for n in ("a", "b", "c")}
    known_assets = replace(KNOWN_ASSETS, entries={**KNOWN_ASSETS.entries, **others}, recipes=recipes)
    keys = {
        "a": {"dataset": "x", "eval_dataset": "y"},
        "b": {"model_name_or_path": "outputs/a/latest/model"},
        "c": {"model_name_or_path": "outputs/b/latest/model", "dataset": "y"},
    }
    sound, _ = split_cycles(
        [resolve(write_recipe(tmp_path, name, **values), known_assets) for name, values in keys.items()]
    )
    assert {node.name: list(node.ancestor_data) for node in sound} == {"a": [], "b": [others["x"]], "c": [others["x"]]}


def test_entries_written_by_hand_are_found_beside_those_that_datasets_write(tmp_path: Path) -> None:
    path = tmp_path / "dataset_info.json"
    path.write_text('{"emoji_train": {}, "my-own": {}}')
    assert external_entries(path, ["emoji_train"]) == {"my-own": dg.AssetKey(["my_own", "dataset_info"])}


def test_mistakes_of_a_recipe_are_an_edge_and_its_own_lead_in_a_circle(tmp_path: Path) -> None:
    """Dagster refuses the whole code location for a circle in the graph."""
    key = dg.AssetKey(["first", "preferences"])
    known = replace(KNOWN_ASSETS, entries={**KNOWN_ASSETS.entries, "first_preferences": key})
    first = resolve(write_recipe(tmp_path, "first"), known)
    after = {"stage": "dpo", "dataset": "first_preferences", "model_name_or_path": "outputs/first/latest/model"}
    second = resolve(write_recipe(tmp_path, "second", **after), known)
    assert second.train_data == {"first_preferences": key} and second.mistakes == [key]
    sound, circular = split_cycles([first, second])
    assert [node.name for node in sound] == ["first", "second"] and not circular
    assert dg.AssetKey(["emoji", "dataset_info"]) in {*sound[1].ancestor_data, *sound[1].data}

    own = resolve(write_recipe(tmp_path, "first", stage="dpo", dataset="first_preferences"), known)
    [(node, error)] = split_cycles([own])[1]
    assert node is own and "first.yaml: dataset leads back to the recipe itself (first <- first)" in str(error)


def test_a_trial_is_evaluated_as_it_was_trained_and_judged_by_what_the_file_names(tmp_path: Path) -> None:
    """A trial with another template or picture size was asked in the file's, and its figures were of other tokens."""
    node = resolve(write_recipe(tmp_path), KNOWN_ASSETS)
    overrides = {"image_max_pixels": 4096, "default_system": "Be brief.", "dataset": "emoji_val", "learning_rate": 0.5}
    overrides["image_do_pan_and_scan"] = True
    with dg.instance_for_test() as instance:
        for metadata in ({}, {"overrides": dg.MetadataValue.json({**overrides, "eval_dataset": "emoji_train"})}):
            instance.report_runless_asset_event(dg.AssetMaterialization(node.key("checkpoint"), metadata=metadata))
            spec = as_trained(dg.build_asset_context(instance=instance), node)
            if not metadata:
                assert spec == node.recipe.spec
    assert (spec.image_max_pixels, spec.default_system, spec.train_entries) == (4096, "Be brief.", ("emoji_val",))
    assert spec.image_do_pan_and_scan and spec.turns == replace(node.recipe.spec, **overrides).turns
    assert spec.eval_entries == ("emoji_val",) and spec.learning_rate == node.recipe.spec.learning_rate
