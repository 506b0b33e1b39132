"""The shipped graph, as a golden file that changes only on purpose."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from mllm_assets.components.checkpoint_asset import CheckpointConfig
from mllm_assets.components.dataset_yaml import Output, Quality, Source, Split
from mllm_assets.components.fine_tuning import Gates, PushToHub
from mllm_assets.components.raw_asset import raw_code_version
from mllm_assets.components.recipe_files import read_recipes
from mllm_assets.components.reporting import unreadable_assets
from mllm_assets.data.spec import DatasetSpec, OutputSpec, QualitySpec, SourceSpec, SplitSpec
from mllm_assets.definitions import defs
from mllm_assets.evaluation.gates import GateSpec
from mllm_assets.evaluation.hub_push import PushSpec
from mllm_assets.training.spec import TrainSpec


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
    pools = {key.path[-1]: node.pools for key, node in _nodes(shipped).items()}
    assert {name for name, found in pools.items() if found == {"gpu"}} == {
        "vision_features",
        "checkpoint",
        "predictions",
        "released_model",
    }


@pytest.mark.parametrize(
    ("component", "spec"),
    [
        (Source, SourceSpec),
        (Split, SplitSpec),
        (Quality, QualitySpec),
        (Output, OutputSpec),
        (Gates, GateSpec),
        (PushToHub, PushSpec),
    ],
)
def test_the_yaml_offers_exactly_the_fields_of_the_spec(component: type[dg.Model], spec: type) -> None:
    assert set(component.model_fields) == set(spec.__dataclass_fields__)


def test_each_knob_of_the_launchpad_is_a_key_of_the_recipe_and_is_described() -> None:
    fields = CheckpointConfig.model_fields
    assert set(fields) - {"force"} <= set(TrainSpec.__dataclass_fields__)
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
        "a_copy.yaml: output_dir 'outputs/mine' is also that of mine.yaml. Give it one of its own, for example "
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
