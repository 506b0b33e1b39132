"""The examples of docs/automation.md are what the components and the resource take."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm_assets.components import FineTuning, ImageTextDataset
from mllm_assets.components.automation.sources import Watch
from mllm_assets.components.fine_tuning import Freshness, ReleaseWatch, Retraining
from mllm_assets.components.resources import AcceleratorResource

TEXT = (Path(__file__).parents[2] / "docs" / "automation.md").read_text(encoding="utf-8")
EXAMPLES: list[dict[str, Any]] = [yaml.safe_load(block.split("```")[0]) for block in TEXT.split("```yaml\n")[1:]]


def test_each_example_holds_attributes_and_values_that_the_component_knows() -> None:
    attributes = [example["attributes"] for example in EXAMPLES if "attributes" in example]
    models = {"weekly_retraining": Retraining, "watch": Watch, "watch_releases": ReleaseWatch, "freshness": Freshness}
    seen = set()
    for example in attributes:
        component = ImageTextDataset if "name" in example else FineTuning
        assert set(example) <= set(component.model_fields)
        for name in models.keys() & example.keys():
            models[name].model_validate(example[name], extra="forbid")
            seen.add(name)
    assert seen == set(models)


def test_the_launchpad_example_names_fields_of_the_resource() -> None:
    [config] = [example["resources"]["gpu"]["config"] for example in EXAMPLES if "resources" in example]
    assert set(config) <= set(AcceleratorResource.model_fields)


@pytest.mark.parametrize(("example", "model"), [("weekly_retraining", Retraining), ("watch", Watch)])
def test_what_an_example_sets_beside_the_switch_is_the_default(example: str, model: type) -> None:
    """The tables of the page and the code say the same."""
    [values] = [e["attributes"][example] for e in EXAMPLES if example in e.get("attributes", {})]
    assert {**values, "enabled": False} == model().model_dump()


def test_freshness_has_a_policy_only_where_an_age_is_set() -> None:
    import dagster as dg

    freshness = Freshness(checkpoint_max_age_days=4)
    policy = freshness.policy_of(dg.AssetKey(["mine", "checkpoint"]))
    assert policy is not None
    assert (policy.fail_window.to_timedelta().days, policy.warn_window.to_timedelta().days) == (4, 3)
    assert freshness.policy_of(dg.AssetKey(["mine", "eval_metrics"])) is None
    assert freshness.policy_of(dg.AssetKey(["mine", "predictions"])) is None
