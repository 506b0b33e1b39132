"""docs/bring-your-own-dataset.md: each YAML of it is read by the component, and it knows every kind and choice."""

import re
from pathlib import Path

import pytest
import yaml

from mllm_assets.components import ImageTextDataset
from mllm_assets.data.ingest.kinds import KINDS
from mllm_assets.data.ingest.spec import AUGMENTATIONS, OUTPUT_FORMATS
from mllm_assets.data.ingest.split_spec import STRATEGIES

PAGE = (Path(__file__).parents[3] / "docs" / "bring-your-own-dataset.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: yaml.safe_load(block)["attributes"]["name"])
def test_each_yaml_of_the_page_is_a_dataset(block: str) -> None:
    component = yaml.safe_load(block)
    assert component["type"] == "mllm_assets.components.ImageTextDataset"
    spec = ImageTextDataset.model_validate(component["attributes"]).spec()
    assert spec.name == component["attributes"]["name"]


def test_the_page_shows_every_kind_and_choice() -> None:
    kinds = {yaml.safe_load(block)["attributes"]["source"]["kind"] for block in BLOCKS}
    assert kinds | {"arrow", "parquet"} == set(KINDS) and "Arrow" in PAGE
    assert [word for word in (*AUGMENTATIONS, *OUTPUT_FORMATS, *STRATEGIES) if word not in PAGE] == []
