"""A dataset is made again when its source has something new, and every tick that launches nothing says why."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from mllm_assets.components.automation.retraining import read_cursor
from mllm_assets.components.automation.sources import LISTING, Watch, source_sensors
from mllm_assets.data.ingest.paths import list_source
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.layout import Layout
from tests.integration.stand_in_hub import Repo, commit_of, running_hub

RAW = dg.AssetKey(["birds", "raw"])
LINE = ("raw", "sample_quality", "corrections", "train", "val", "test", "dataset_info")


class Ticks:
    """One dataset's sensor with its cursor, on an instance of its own."""

    def __init__(self, source: SourceSpec, layout: Layout, instance: dg.DagsterInstance, settle_s: float = 0) -> None:
        spec = DatasetSpec(name="birds", source=source, prompts=("What?",))
        settings = Watch(enabled=True, every_s=1, settle_s=settle_s, max_runtime_h=2)
        [self.sensor] = source_sensors(spec, settings, layout)
        self.instance, self.cursor = instance, None

        @dg.multi_asset(can_subset=True, specs=[dg.AssetSpec(["birds", name]) for name in LINE])
        def made():
            yield from ()

        self.repository = dg.Definitions(assets=[made], sensors=[self.sensor]).get_repository_def()

    def ingested(self, **metadata: str) -> None:
        self.instance.report_runless_asset_event(dg.AssetMaterialization(RAW, metadata=metadata))

    def tick(self) -> dg.RunRequest | str:
        context = dg.build_sensor_context(self.instance, self.cursor, repository_def=self.repository)
        data = self.sensor.evaluate_tick(context)
        self.cursor = data.cursor or self.cursor
        return data.run_requests[0] if data.run_requests else data.skip_message


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def test_changed_files_are_ingested_once_after_they_rested(
    layout: Layout, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SourceSpec(kind="image_folder", path="birds")
    folder = layout.root / "birds" / "deep"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"1")
    ticks = Ticks(source, layout, instance, settle_s=3600)
    assert ticks.tick() == "birds/raw was never made: materialise it once, then it is kept up to date"

    ticks.ingested(**{LISTING: list_source(source, layout.root).digest})
    assert ticks.tick() == "the 1 files of birds are those that were ingested"

    (folder / "b.png").write_bytes(b"2")
    changing = "the 2 files of birds changed; they are ingested once nothing changes for 3600 s"
    assert ticks.tick() == changing
    cursor = json.loads(ticks.cursor)
    assert cursor["version"] == 1
    cursor["since"]["since_boot_s"] -= 3601
    ticks.cursor = json.dumps(cursor)
    (folder / "b.png").write_bytes(b"still being copied")
    assert ticks.tick() == changing, "it starts to wait again"
    with monkeypatch.context() as ahead:
        tomorrow_s = time.time() + 86400
        ahead.setattr(time, "time", lambda: tomorrow_s)
        assert ticks.tick() == changing, "a clock that is set forward does not make files settle"

    cursor = json.loads(ticks.cursor)
    cursor["since"]["since_boot_s"] -= 3601
    ticks.cursor = json.dumps(cursor)
    request = ticks.tick()
    assert isinstance(request, dg.RunRequest)
    assert [key.path[-1] for key in request.asset_selection] == list(LINE)
    assert request.tags["dagster/max_runtime"] == "7200"
    assert "changed, and then did not for 36" in request.tags["mllm_assets/reason"]
    again = ticks.tick()
    assert isinstance(again, str) and again.endswith("did not succeed: see the runs of birds/raw")

    ticks.ingested(**{LISTING: list_source(source, layout.root).digest})
    assert ticks.tick() == "the 2 files of birds are those that were ingested"


def test_no_second_run_is_launched_while_one_is_in_progress(layout: Layout, instance: dg.DagsterInstance) -> None:
    (layout.root / "a.parquet").write_bytes(b"1")
    ticks = Ticks(SourceSpec(kind="parquet", path="*.parquet"), layout, instance)
    ticks.ingested(**{LISTING: "another"})
    job = ticks.repository.get_implicit_global_asset_job_def()
    instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, asset_selection=frozenset([RAW]))
    assert ticks.tick() == "a run of birds is in progress"


def test_a_source_that_is_gone_is_a_reason_to_skip(layout: Layout, instance: dg.DagsterInstance) -> None:
    ticks = Ticks(SourceSpec(kind="image_folder", path="birds"), layout, instance)
    ticks.ingested()
    assert "there is no folder" in str(ticks.tick())


def test_a_new_commit_of_the_declared_branch_is_ingested_once(
    layout: Layout, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    with running_hub() as hub:
        repo = Repo({commit_of(name): {} for name in ("first", "second")}, {"main": commit_of("first")})
        hub.repos = {"datasets/made/set": repo}
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        ticks = Ticks(SourceSpec(kind="huggingface", repo="made/set", revision="main"), layout, instance)
        ticks.ingested(revision=commit_of("first"))
        assert ticks.tick() == f"main of made/set is still at {commit_of('first')[:12]}"

        repo.refs["main"] = commit_of("second")
        request = ticks.tick()
        assert isinstance(request, dg.RunRequest)
        assert f"is at {commit_of('second')[:12]} now" in request.tags["mllm_assets/reason"]
        assert "a run for that was already launched" in str(ticks.tick())
        ticks.ingested(revision=commit_of("second"))
        assert "is still at" in str(ticks.tick())

        hub.repos.clear()
        assert str(ticks.tick()).startswith("The dataset 'made/set' does not exist on the Hub, or is private.")
    assert hub.num_body_bytes < 10_000, "only the API is asked, no file is read"


def test_what_cannot_change_has_no_sensor(layout: Layout) -> None:
    settings = Watch(enabled=True, every_s=1, settle_s=0, max_runtime_h=None)
    for source in (
        SourceSpec(kind="parquet", path="package:emoji.parquet"),
        SourceSpec(kind="huggingface", repo="made/set", revision="0" * 40),
    ):
        assert source_sensors(DatasetSpec(name="birds", source=source, prompts=("What?",)), settings, layout) == []


def test_a_listing_sees_names_sizes_and_times(tmp_path: Path) -> None:
    source = SourceSpec(kind="image_folder", path="birds")
    (tmp_path / "birds").mkdir()
    path = tmp_path / "birds" / "a.png"
    path.write_bytes(b"1")
    seen = {list_source(source, tmp_path).digest}
    os.utime(path, ns=(1, 1))
    seen.add(list_source(source, tmp_path).digest)
    path.rename(path.with_name("b.png"))
    seen.add(list_source(source, tmp_path).digest)
    path.with_name("b.png").write_bytes(b"22")
    os.utime(path.with_name("b.png"), ns=(1, 1))
    seen.add(list_source(source, tmp_path).digest)
    assert len(seen) == 4


@pytest.mark.parametrize("text", [None, "", "no JSON", "[]", '{"version": 2, "listing": "a"}', '{"listing": "a"}'])
def test_a_cursor_of_another_version_is_as_none(text: str | None) -> None:
    assert read_cursor(text) == {}
