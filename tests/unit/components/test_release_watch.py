"""The sensor acts on a released model that got worse, once, and says why wherever it does not."""

import json
import time
from collections.abc import Iterator

import dagster as dg
import numpy as np
import pytest

from mllm_assets.artifacts import staged_directory, write_manifest
from mllm_assets.components.automation.releases import ReleaseWatch, released_model_regression
from mllm_assets.evaluation.metrics import write_metrics
from mllm_assets.evaluation.table import PREDICTIONS_FILE, SCHEMA, to_table
from mllm_assets.layout import Layout

LINES = {"mine": ["mine"]}


class World:
    """A released recipe, its evaluations and the sensor with its cursor."""

    def __init__(self, layout: Layout, instance: dg.DagsterInstance) -> None:
        self.layout, self.instance, self.cursor = layout, instance, None

        @dg.multi_asset(
            specs=[dg.AssetSpec(["mine", name]) for name in ("checkpoint", "eval_metrics", "released_model")]
        )
        def made():
            yield from ()

        job = dg.define_asset_job("retraining", selection=dg.AssetSelection.all())
        self.repository = dg.Definitions(assets=[made], jobs=[job]).get_repository_def()

    def write_predictions(self, folder: str, mean: float, seed: int, **manifest: object) -> str:
        directory = self.layout.root / folder
        losses = np.random.default_rng(seed).normal(mean, 0.2, 40)
        values = dict.fromkeys(SCHEMA.names) | {"model": "tuned", "entry": "val"}
        rows = [{**values, "row_index": index, "loss_nats": float(loss)} for index, loss in enumerate(losses)]
        import pyarrow.parquet as pq

        with staged_directory(directory) as staging:
            pq.write_table(to_table(rows), staging / PREDICTIONS_FILE)
            write_manifest(staging, {"digest": folder, **manifest})
        return folder

    def release(self) -> None:
        self.write_predictions("releases/mine/v1", 1.0, 1, weights_digest="weights-1", version="v1")

    def evaluate(self, mean: float, *, weights: str = "weights-1") -> None:
        path = self.write_predictions(f"outputs/mine/predictions/{mean}-{weights}", mean, 2)
        inputs = {"weights_digest": weights, "predictions": f"p{mean}", "predictions_path": path}
        directory = self.layout.root / f"outputs/mine/eval_metrics/{mean}-{weights}"
        write_metrics(directory, {}, inputs)
        metadata = {"path": self.layout.relative(directory)}
        self.instance.report_runless_asset_event(dg.AssetMaterialization(["mine", "eval_metrics"], metadata=metadata))

    def tick(self, **settings: object) -> "dg.SensorExecutionData":  # pyright: ignore
        watch = ReleaseWatch(enabled=True, **settings)  # pyright: ignore
        sensor = released_model_regression(LINES, "retraining", self.layout, watch)
        context = dg.build_sensor_context(self.instance, self.cursor, repository_def=self.repository)
        data = sensor.evaluate_tick(context)
        self.cursor = data.cursor
        return data


@pytest.fixture
def world(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.delenv("MLLM_ASSETS_ALERT_WEBHOOK", raising=False)
    with dg.DagsterInstance.ephemeral() as instance:
        yield World(layout, instance)


def test_each_tick_that_does_nothing_says_why(world: World) -> None:
    assert world.tick().skip_message == "mine: nothing is released"
    world.release()
    assert world.tick().skip_message == "mine: never evaluated"
    world.evaluate(1.0)
    assert "mine v1: val: the loss rose by" in world.tick().skip_message
    assert world.tick().skip_message == "mine: no evaluation since the last check of v1"
    world.evaluate(9.0, weights="weights-2")
    assert world.tick().skip_message == "mine: the newest evaluation is of another model than the release v1"
    assert json.loads(world.cursor)["version"] == 1


def test_a_regression_is_shown_once_launches_what_changed_and_then_cools_down(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.release()
    world.instance.report_runless_asset_event(dg.AssetMaterialization(["mine", "checkpoint"]))
    world.evaluate(2.0)
    data = world.tick(retrain=True)
    [request] = data.run_requests
    assert request.tags["mllm_assets/retraining"] == "mine"
    assert dg.AssetKey(["mine", "released_model"]) in request.asset_selection
    [event] = data.asset_events
    assert event.asset_key == dg.AssetKey(["mine", "released_model"])
    assert event.description.startswith("Regressed on a re-evaluation. val: the loss rose by")

    assert world.tick(retrain=True).skip_message == "mine: no evaluation since the last check of v1"
    world.evaluate(3.0)
    cooling = world.tick(retrain=True)
    assert "It regressed; no alarm for another 24.0 h after the last one" in cooling.skip_message
    assert (cooling.run_requests, list(cooling.asset_events)) == ([], [])
    now_s = time.time()
    with monkeypatch.context() as clock:
        clock.setattr(time, "time", lambda: now_s + 86400)
        assert "for another 24.0 h" in world.tick().skip_message, "the clock was set forward"
        clock.setattr(time, "time", lambda: now_s - 86400)
        assert "for another 24.0 h" in world.tick().skip_message, "the clock was set back"
    assert world.tick(cooldown_h=0).asset_events, "the evaluation was not forgotten while it cooled down"


def test_a_regression_without_retraining_is_only_said(world: World) -> None:
    world.release()
    world.evaluate(2.0)
    data = world.tick()
    assert not data.run_requests and data.asset_events
    assert data.skip_message.endswith("It regressed.")
