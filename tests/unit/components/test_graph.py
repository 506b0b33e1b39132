"""The shipped graph, as a golden file that changes only on purpose."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from mllm_assets import components
from mllm_assets.components.assets.checkpoint import CheckpointConfig
from mllm_assets.components.assets.dataset import raw_code_version
from mllm_assets.components.image_text_dataset import Output, Quality, Source, Split
from mllm_assets.components.reporting import OFF, unreadable_assets
from mllm_assets.components.wiring import Gates, read_recipes
from mllm_assets.components.yaml_model import YamlModel
from mllm_assets.data.ingest.kinds import KINDS
from mllm_assets.data.ingest.spec import DatasetSpec, OutputSpec, QualitySpec, SourceSpec
from mllm_assets.data.ingest.split_spec import SplitSpec
from mllm_assets.definitions import defs
from mllm_assets.errors import RecipeError
from mllm_assets.evaluation.gates import GateSpec
from mllm_assets.recipe.spec import TrainSpec


@pytest.fixture(scope="module")
def shipped() -> dg.Definitions:
    return defs()


def test_the_asset_graph_is_the_golden_one(shipped: dg.Definitions, golden: Callable[[str, Any], None]) -> None:
    graph = {
        spec.key.to_user_string(): {
            "group": spec.group_name,
            "kinds": sorted(spec.kinds),
            "deps": sorted(dep.asset_key.to_user_string() for dep in spec.deps),
        }
        for spec in shipped.resolve_all_asset_specs()
    }
    checks = sorted(key.to_user_string() for key in shipped.resolve_asset_graph().asset_check_keys)
    golden("asset_graph", {"assets": graph, "checks": checks})


def test_every_shipped_recipe_and_dataset_can_be_built(shipped: dg.Definitions) -> None:
    assert unreadable_assets(shipped) == {}


def test_every_asset_says_what_it_is(shipped: dg.Definitions) -> None:
    assert [s.key.to_user_string() for s in shipped.resolve_all_asset_specs() if not s.description] == []


def test_a_tag_narrows_the_graph_to_the_line_of_a_recipe_or_a_dataset(shipped: dg.Definitions) -> None:
    tagged = {spec.key.to_user_string(): spec.tags for spec in shipped.resolve_all_asset_specs()}
    for tag in ("recipe", "dataset"):
        lines = {key for key, tags in tagged.items() if tags.get(tag) == key.split("/")[0]}
        assert {key for key, tags in tagged.items() if tag in tags} == lines
    assert {key.split("/")[0] for key, tags in tagged.items() if not {"recipe", "dataset"} & tags.keys()} == {
        "pretrained"
    }
    assert tagged["emoji_sft/checkpoint"]["finetuning_type"] == "full"


def test_whatever_runs_a_model_waits_for_the_gpu(shipped: dg.Definitions) -> None:
    pools = {key.path[-1]: node.pools for key, node in _nodes(shipped).items() if OFF not in node.tags}
    assert {name for name, found in pools.items() if found == {"gpu"}} == {
        "vision_features",
        "checkpoint",
        "predictions",
        "released_model",
    }


def test_the_groups_are_the_datasets_and_the_recipes_and_the_stages_are_tags(shipped: dg.Definitions) -> None:
    """Groups by stage drew a lane of each stage, and every line crossed all of them.

    A collapsed group shows its name alone, and a line that is off looked like any other.
    """
    specs = list(shipped.resolve_all_asset_specs())
    groups = {spec.group_name: spec.key.path[0] + ("_off" if OFF in spec.tags else "") for spec in specs}
    assert list(groups) == list(groups.values())
    assert {spec.tags.get("stage") for spec in specs} == {"ingest", "curate", "train", "evaluate", "release"}


def test_what_needs_the_hub_or_a_gpu_ends_at_once_and_says_how_it_is_switched_on(shipped: dg.Definitions) -> None:
    """ "Materialize all" of a new project asked the Hub for four data sets and gemma-3-4b."""
    off = {spec.key.path[0]: spec for spec in shipped.resolve_all_asset_specs() if OFF in spec.tags}
    assert set(off) == {
        "food101", "naruto", "pokemon", "pretrained",
        "gemma3_projector_sft", "gemma3_trans_projector_head_sft", "gemma3_lora_sft",
    }  # fmt: skip
    raw = shipped.get_assets_def(["naruto", "raw"])
    with dg.instance_for_test() as instance:
        done = dg.materialize([raw], instance=instance, raise_on_error=False)
    [failure] = done.get_step_failure_events()
    assert "mllm-assets enable naruto" in (failure.step_failure_data.user_failure_data.description or "")


def test_every_recipe_and_dataset_has_a_job_of_its_name(shipped: dg.Definitions) -> None:
    jobs = {job.name for job in shipped.resolve_all_job_defs()}
    assert {"emoji", "emoji_sft", "naruto", "gemma3_lora_sft", "retraining"} <= jobs
    made = shipped.resolve_job_def("emoji_sft").asset_layer.executable_asset_keys
    assert {key.path[0] for key in made} == {"emoji", "emoji_sft", "pretrained"}


@pytest.mark.parametrize("name", components.__all__)
def test_the_schema_describes_every_key_of_a_component_and_of_what_is_nested_in_it(name: str) -> None:
    """Dagster dropped the description of each key with a default, so that the UI showed four of a hundred."""
    schema = getattr(components, name).get_model_cls().model_json_schema()
    nested = {title: found["properties"] for title, found in schema["$defs"].items()}
    objects = {name: schema["properties"], **nested}
    keys = [(f"{title}.{key}", value) for title, found in objects.items() for key, value in found.items()]
    assert [key for key, value in keys if not value.get("description")] == []


def test_the_schema_lists_the_registered_kinds_of_source_and_those_that_a_plugin_adds_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(KINDS, "mine", KINDS["parquet"])
    schema = components.ImageTextDataset.get_model_cls().model_json_schema()
    text, _template = schema["$defs"]["SourceModel"]["properties"]["kind"]["anyOf"]
    known = "huggingface table parquet arrow coco image_folder webdataset llamafactory mine"
    assert text["enum"] == known.split()


@pytest.mark.parametrize(
    ("form", "spec"), [(Split, SplitSpec), (Quality, QualitySpec), (Output, OutputSpec), (Gates, GateSpec)]
)
def test_without_a_key_or_with_null_the_yaml_gives_the_default_of_the_spec(form: type[YamlModel], spec: type) -> None:
    assert form.resolve_from_yaml("{}").to_spec() == spec()
    key = next(iter(spec.__dataclass_fields__))
    assert form.resolve_from_yaml(f"{key}: null").to_spec() == spec()


def test_a_null_that_means_something_is_kept_and_a_list_becomes_a_tuple() -> None:
    source = Source.resolve_from_yaml("{kind: parquet, path: [a.parquet, b.parquet], caption_column: null}").to_spec()
    assert source == SourceSpec(kind="parquet", path=("a.parquet", "b.parquet"), caption_column=None)


def test_a_value_that_cannot_stand_fails_when_it_is_used_and_not_when_the_yaml_is_read() -> None:
    split = Split.resolve_from_yaml("num_train: 0")
    with pytest.raises(RecipeError, match="num_train: expected a whole number of at least 1, got 0"):
        split.to_spec()


def test_each_knob_of_the_launchpad_is_a_key_of_the_recipe_and_is_described() -> None:
    fields = CheckpointConfig.model_fields
    assert set(fields) - {"force", "other"} <= set(TrainSpec.__dataclass_fields__)
    assert all(field.description for field in fields.values())


def test_a_recipe_that_cannot_be_read_becomes_an_asset_that_fails_with_the_message(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("stage: sft\nlearning_rte: 1.0e-4\n")
    recipes, assets = read_recipes(tmp_path, "*.yaml")
    assert recipes == []
    assert list(unreadable_assets(dg.Definitions(assets=assets))) == ["broken/checkpoint"]
    result = dg.materialize(assets, raise_on_error=False)
    [failure] = result.get_step_failure_events()
    assert failure.step_key == "broken__checkpoint"
    assert (
        "unknown key 'learning_rte'. Did you mean learning_rate?"
        in failure.step_failure_data.user_failure_data.description
    )


def test_two_files_with_the_same_slug_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a-b.yaml").touch()
    (tmp_path / "a_b.yaml").touch()
    _, [asset] = read_recipes(tmp_path, "*.yaml")
    assert (
        "a-b.yaml and a_b.yaml would both be the recipe 'a_b'. Rename one." in asset.specs_by_key[asset.key].description
    )


RECIPE = """stage: sft
do_train: true
finetuning_type: full
model_name_or_path: pretrains/gemma3_tiny
dataset: emoji_train
template: gemma3
output_dir: outputs/mine
"""


def test_of_two_recipes_with_one_output_dir_the_one_that_it_is_named_after_keeps_it(tmp_path: Path) -> None:
    """A copy with an earlier name made the recipe that was there before the one that cannot be built."""
    for name in ("a_copy", "mine"):
        (tmp_path / f"{name}.yaml").write_text(RECIPE)
    recipes, [copy] = read_recipes(tmp_path, "*.yaml")
    assert [recipe.name for recipe in recipes] == ["mine"]
    assert copy.key.to_user_string() == "a_copy/checkpoint"
    assert (
        "a_copy.yaml: output_dir 'outputs/mine' is also that of mine.yaml. Give it its own, for example "
        "outputs/a_copy." in (copy.specs_by_key[copy.key].description or "")
    )


def test_recipes_with_one_output_dir_that_is_named_after_neither_are_both_told_of_the_other(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / f"{name}.yaml").write_text(RECIPE)
    recipes, assets = read_recipes(tmp_path, "*.yaml")
    assert recipes == []
    first, second = (asset.specs_by_key[asset.key].description or "" for asset in assets)
    assert "first.yaml: output_dir 'outputs/mine' is also that of second.yaml." in first
    assert "second.yaml: output_dir 'outputs/mine' is also that of first.yaml." in second


def _nodes(shipped: dg.Definitions) -> dict[dg.AssetKey, Any]:
    graph = shipped.resolve_asset_graph()
    return {key: graph.get(key) for key in graph.materializable_asset_keys}


def test_asking_for_more_of_a_hub_dataset_makes_its_raw_outdated() -> None:
    """Only as many rows are fetched as the splits ask for, so larger splits need another fetch."""
    hub = SourceSpec(kind="huggingface", repo="a/b")
    file = SourceSpec(kind="parquet", path="a.parquet")

    def version(source: SourceSpec, num_train: int) -> str:
        split = SplitSpec(num_train=num_train)
        return raw_code_version(DatasetSpec(name="a", source=source, prompts=("What?",), split=split))

    assert version(hub, 500) != version(hub, 5000)
    assert version(file, 500) == version(file, 5000)
