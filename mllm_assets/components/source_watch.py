"""Sensors that ingest a dataset again when its source has something new: a Hub revision, or files in a folder."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import dagster as dg

from mllm_assets.components.cursors import read_cursor, write_cursor
from mllm_assets.components.retraining import max_runtime_tags, run_in_progress
from mllm_assets.data.hub import dataset_repo
from mllm_assets.data.listing import is_watchable, list_source
from mllm_assets.data.spec import DatasetSpec
from mllm_assets.errors import MllmAssetsError
from mllm_assets.hub import find_repo, is_commit
from mllm_assets.layout import Layout

LISTING = "source_listing"  # of the raw asset's metadata


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchSettings:
    """How a dataset's source is watched; see `components.dataset_yaml.Watch`."""

    enabled: bool
    every_s: int
    settle_s: float
    max_runtime_h: float | None


def source_sensors(spec: DatasetSpec, settings: WatchSettings, layout: Layout) -> list[dg.SensorDefinition]:
    """The sensor that fits the source; none for one that can never change."""
    if spec.source.kind == "huggingface":
        fixed = is_commit(spec.source.revision)
        return [] if fixed else [_sensor(spec, settings, "new_revision", _RevisionWatch(spec, settings))]
    if is_watchable(spec.source):
        return [_sensor(spec, settings, "new_files", _FilesWatch(spec, settings, layout))]
    return []


class _RevisionWatch:
    """Asks the Hub which commit the declared branch or tag stands for now."""

    what = "the declared revision of its Hub repository stands for another commit"

    def __init__(self, spec: DatasetSpec, settings: WatchSettings) -> None:
        self._source = spec.source

    def tick(self, known: dict[str, str], cursor: dict) -> tuple[str | None, str, dict]:
        commit = find_repo(dataset_repo(self._source)).sha
        name = f"{self._source.revision or 'the default branch'} of {self._source.repo}"
        if commit == known.get("revision"):
            return None, f"{name} is still at {commit[:12]}", {}
        return commit, f"{name} is at {commit[:12]} now, ingested was {known.get('revision', '')[:12]}", cursor


class _FilesWatch:
    """Compares names, sizes and times of the source's files with those that were ingested."""

    what = "files of its source came, went or were written, and then rested"

    def __init__(self, spec: DatasetSpec, settings: WatchSettings, layout: Layout) -> None:
        self._source, self._settle_s, self._layout = spec.source, settings.settle_s, layout

    def tick(self, known: dict[str, str], cursor: dict) -> tuple[str | None, str, dict]:
        listing = list_source(self._source, self._layout.root)
        files = f"the {listing.num_files} files of {', '.join(self._source.paths)}"
        if listing.digest == known.get(LISTING):
            return None, f"{files} are those that were ingested", {}
        now_s = time.time()
        if cursor.get("listing") != listing.digest:
            cursor = {**cursor, "listing": listing.digest, "since_s": now_s}
        rested_s = now_s - cursor["since_s"]
        if rested_s < self._settle_s:
            why = f"{files} changed; they are ingested once nothing changes for {self._settle_s:g} s"
            return None, why, cursor
        return listing.digest, f"{files} changed and rested for {rested_s:.0f} s", cursor


def _sensor(
    spec: DatasetSpec, settings: WatchSettings, name: str, watch: _RevisionWatch | _FilesWatch
) -> dg.SensorDefinition:
    keys = [dg.AssetKey([spec.name, last]) for last in ("raw", "sample_quality", "train", "val", "dataset_info")]
    raw = keys[0].to_user_string()

    @dg.sensor(
        name=f"{spec.name}_{name}",
        target=dg.AssetSelection.assets(*keys),
        minimum_interval_seconds=settings.every_s,
        default_status=dg.DefaultSensorStatus.RUNNING if settings.enabled else dg.DefaultSensorStatus.STOPPED,
        description=f"Makes {spec.name} again, from {raw} to its entries, when {watch.what}.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> Iterator[dg.SkipReason | dg.RunRequest]:
        event = context.instance.get_latest_materialization_event(keys[0])
        if event is None or event.asset_materialization is None:
            yield dg.SkipReason(f"{raw} was never made: materialise it once, then it is kept up to date")
            return
        if run_in_progress(context.instance, keys):
            yield dg.SkipReason(f"a run of {spec.name} is in progress")
            return
        known = {key: str(value.value) for key, value in event.asset_materialization.metadata.items()}
        cursor = read_cursor(context.cursor)
        try:
            new, why, cursor = watch.tick(known, cursor)
        except MllmAssetsError as error:
            yield dg.SkipReason(str(error))
            return
        if new is not None and cursor.get("launched") == new:
            why, new = f"{why}; a run for that was launched already and did not succeed: see the runs of {raw}", None
        context.update_cursor(write_cursor(**(cursor if new is None else {**cursor, "launched": new})))
        if new is None:
            yield dg.SkipReason(why)
        else:
            yield dg.RunRequest(
                run_key=None,
                asset_selection=keys,
                tags={"mllm_assets/reason": why, **max_runtime_tags(settings.max_runtime_h)},
            )

    return sensor
