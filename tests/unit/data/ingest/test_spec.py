"""A dataset's YAML is refused where it is wrong, naming the field and what to do."""

from typing import Any

import pytest

from mllm_assets.data.ingest.spec import DatasetSpec, OutputSpec, QualitySpec, SourceSpec, as_json
from mllm_assets.data.ingest.split_spec import SplitSpec
from mllm_assets.errors import RecipeError

SOURCE = SourceSpec(kind="parquet", path="a.parquet")


def dataset(**fields: Any) -> DatasetSpec:
    return DatasetSpec(**{"name": "made", "source": SOURCE, "prompts": ("What is this?",), **fields})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SourceSpec(kind="csv"),
            "source.kind: expected one of huggingface, table, parquet, arrow, coco, image_folder",
        ),
        (lambda: SourceSpec(kind="huggingface"), "source.repo is empty"),
        (lambda: SourceSpec(kind="parquet"), "source.path is empty"),
        (lambda: SplitSpec(num_train=0), "num_train: expected a whole number of at least 1, got 0"),
        (lambda: SplitSpec(num_val=True), "num_val: expected a whole number of at least 1, got True"),
        (lambda: SplitSpec(strategy="random"), "split.strategy: expected one of grouped, guide, got 'random'"),
        (lambda: OutputSpec(format="csv"), "output.format: expected one of json, jsonl, parquet, got 'csv'"),
        (lambda: QualitySpec(duplicate_distance_bits=40), "duplicate_distance_bits: expected 0 to 16"),
        (lambda: QualitySpec(reject_flags=("blurry",)), "quality.reject_flags: expected one of image_dark"),
        (lambda: dataset(name="My Data"), "Use 'my_data'"),
        (lambda: dataset(prompts=()), "'made' has no prompts. Add at least one question"),
        (lambda: dataset(prompts=("ok", " ")), "prompts[1]: expected a text"),
        (lambda: dataset(prompts=("<image>What?",)), "control token '<image>'"),
        (lambda: dataset(system="be<end_of_turn>"), "control token '<end_of_turn>'"),
        (lambda: dataset(answer="yes"), "neither {caption} nor {label}"),
        (lambda: dataset(answer="{label}"), "source.label_column is not set"),
        (
            lambda: dataset(train_entry="same", val_entry="same"),
            "its splits are same, same, made_test. Give them",
        ),
    ],
)
def test_a_wrong_field_is_named_with_the_cure(make: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make()
    assert message in str(caught.value)


def test_entries_are_named_after_the_dataset_unless_the_yaml_names_them() -> None:
    assert (dataset().train_entry, dataset().val_entry) == ("made_train", "made_val")
    assert dataset(train_entry="gemma3_vlm_train").train_entry == "gemma3_vlm_train"


def test_a_single_prompt_may_be_written_as_a_text() -> None:
    """A YAML scalar would otherwise become one prompt a letter."""
    assert dataset(prompts="What is this?").prompts == ("What is this?",)


def test_a_spec_is_json() -> None:
    sizes = {"num_train": 500, "num_val": 50, "num_test": None}
    assert as_json(dataset())["split"] == {**sizes, "seed": 42, "strategy": "grouped"}
