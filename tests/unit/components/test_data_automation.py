"""Declarative automation follows content: a new materialisation with the same data version starts nothing."""

import dagster as dg

from mllm_assets.components.automation.sources import automation_sensor, with_automation


@dg.asset(key=["birds", "raw"])
def raw() -> dg.MaterializeResult: ...


@dg.asset(key=["birds", "sample_quality"], deps=[raw])
def quality() -> dg.MaterializeResult: ...


@dg.asset(
    key=["birds", "train"],
    deps=[quality],
    check_specs=[dg.AssetCheckSpec("counts_add_up", asset=["birds", "train"], blocking=True)],
)
def train() -> dg.MaterializeResult: ...


@dg.asset(key=["birds", "dataset_info"], deps=[train])
def dataset_info() -> dg.MaterializeResult: ...


DERIVED = [with_automation(asset) for asset in (quality, train, dataset_info)]


class Ticks:
    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance, self.cursor = instance, None

    def made(self, name: str, version: str, *, passed: bool = True) -> None:
        key = dg.AssetKey(["birds", name])
        self.instance.report_runless_asset_event(dg.AssetMaterialization(key, tags={"dagster/data_version": version}))
        if name == "train":
            evaluation = dg.AssetCheckEvaluation(asset_key=key, check_name="counts_add_up", passed=passed)
            self.instance.report_runless_asset_event(evaluation)

    def requested(self) -> list[str]:
        definitions = dg.Definitions(assets=[raw, *DERIVED])
        result = dg.evaluate_automation_conditions(definitions, self.instance, cursor=self.cursor)
        self.cursor = result.cursor
        return [key.path[-1] for key in (quality.key, train.key, dataset_info.key) if result.get_num_requested(key)]


def test_what_is_below_changed_content_is_made_and_same_content_starts_nothing() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        ticks = Ticks(instance)
        for name in ("raw", "sample_quality", "train", "dataset_info"):
            ticks.made(name, "1")
        assert ticks.requested() == []
        ticks.made("raw", "1")
        assert ticks.requested() == [], "made again with the same content"
        ticks.made("raw", "2")
        assert ticks.requested() == ["sample_quality", "train", "dataset_info"]
        assert ticks.requested() == [], "asked for once"


def test_nothing_is_made_below_a_failed_blocking_check() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        ticks = Ticks(instance)
        for name in ("raw", "sample_quality", "train", "dataset_info"):
            ticks.made(name, "1")
        assert ticks.requested() == []
        ticks.made("train", "2", passed=False)
        assert ticks.requested() == []


def test_the_sensor_is_on_and_leaves_the_source_alone() -> None:
    sensor = automation_sensor("birds", DERIVED)
    assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
    targets = sensor.asset_selection.resolve([raw, *DERIVED])
    assert targets == {quality.key, train.key, dataset_info.key}
