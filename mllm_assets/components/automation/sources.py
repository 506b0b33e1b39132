"""Sensors that ingest a dataset again when its source has something new: a Hub revision, or files in a folder."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from mllm_assets.components.automation.retraining import max_runtime_tags, read_cursor, run_in_progress, write_cursor
from mllm_assets.components.facts import facts_of
from mllm_assets.components.yaml_model import YamlModel
from mllm_assets.data.ingest.hub import dataset_repo
from mllm_assets.data.ingest.paths import is_watchable, list_source
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.data.ingest.split_spec import SIDES
from mllm_assets.errors import MllmAssetsError
from mllm_assets.hub.client import find_repo, is_commit
from mllm_assets.layout import Layout
from mllm_assets.process_id import Moment, boot_id

LISTING = "source_listing"  # of the raw asset's metadata
SOURCE = "source"  # of the metadata in its definition: the spec
News = tuple[str | None, str, dict[str, Any]]  # what is new or None, why, and the sensor's cursor
# Dagster's `eager` follows every new materialisation, even one with the same content
_CHANGED_UPSTREAM = dg.AutomationCondition.any_deps_updated().replace(
    "newly_updated", dg.AutomationCondition.data_version_changed()
)


class Watch(YamlModel):
    """The sensor that makes the dataset again when its source has something new.

    Attributes:
        enabled: Whether it runs without being switched on in the UI.
        every_s: Seconds between two checks.
        settle_s: Seconds without a change to any file before changed files are ingested, so that a folder is not
            ingested while it is being copied. No effect on a Hub dataset.
        max_runtime_h: Hours after which a run is ended; null: never.
    """

    enabled: bool = False
    every_s: int = Field(default=600, ge=1)
    settle_s: float = Field(default=60.0, ge=0)
    max_runtime_h: float | None = Field(default=6.0, gt=0)


def source_sensors(spec: DatasetSpec, settings: Watch, layout: Layout) -> list[dg.SensorDefinition]:
    """The sensor for the source; none for a source that can never change."""
    if spec.source.is_of_hub and not is_commit(spec.source.revision):
        what = "the declared revision of its Hub repository points to another commit"
        return [_sensor(spec, settings, "new_revision", what, partial(_find_revision, spec.source))]
    if not spec.source.is_of_hub and is_watchable(spec.source):
        what = "files of its source were added, deleted or changed, and then settled"
        find = partial(_find_files, spec.source, settings.settle_s, layout.root)
        return [_sensor(spec, settings, "new_files", what, find)]
    return []


def _find_revision(source: SourceSpec, known: dict[str, str], cursor: dict) -> News:
    """Ask the Hub which commit the declared branch or tag points to now."""
    commit = find_repo(dataset_repo(source)).sha
    name = f"{source.revision or 'the default branch'} of {source.repo}"
    if commit == known.get("revision"):
        return None, f"{name} is still at {commit[:12]}", {}
    return commit, f"{name} is at {commit[:12]} now, ingested was {known.get('revision', '')[:12]}", cursor


def _find_files(source: SourceSpec, settle_s: float, root: Path, known: dict[str, str], cursor: dict) -> News:
    """Compare names, sizes and times of the source's files with those that were ingested."""
    listing = list_source(source, root)
    files = f"the {listing.num_files} files of {', '.join(source.paths)}"
    if listing.digest == known.get(LISTING):
        return None, f"{files} are those that were ingested", {}
    since = Moment.from_dict(cursor.get("since"))
    if cursor.get("listing") != listing.digest or since is None or since.boot != boot_id():
        since = Moment.now()  # also after a restart: nothing checked meanwhile, and the clock may have been set
        cursor = {**cursor, "listing": listing.digest, "since": asdict(since)}
    settled_s = since.elapsed_s()
    if settled_s < settle_s:
        return None, f"{files} changed; they are ingested once nothing changes for {settle_s:g} s", cursor
    return listing.digest, f"{files} changed, and then did not for {settled_s:.0f} s", cursor


def _sensor(
    spec: DatasetSpec, settings: Watch, name: str, what: str, find_new: Callable[[dict[str, str], dict], News]
) -> dg.SensorDefinition:
    keys = [dg.AssetKey([spec.name, last]) for last in ("raw", "sample_quality", "corrections", *SIDES, "dataset_info")]
    raw = keys[0].to_user_string()

    @dg.sensor(
        name=f"{spec.name}_{name}",
        target=dg.AssetSelection.assets(*keys),
        minimum_interval_seconds=settings.every_s,
        default_status=dg.DefaultSensorStatus.RUNNING if settings.enabled else dg.DefaultSensorStatus.STOPPED,
        description=f"Makes {spec.name} again, from {raw} to its entries, when {what}.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> Iterator[dg.SkipReason | dg.RunRequest]:
        event = context.instance.get_latest_materialization_event(keys[0])
        if event is None or event.asset_materialization is None:
            yield dg.SkipReason(f"{raw} was never made: materialise it once, then it is kept up to date")
            return
        if run_in_progress(context.instance, keys):
            yield dg.SkipReason(f"a run of {spec.name} is in progress")
            return
        known = {key: str(value) for key, value in facts_of(event.asset_materialization.metadata).items()}
        cursor = read_cursor(context.cursor)
        try:
            new, why, cursor = find_new(known, cursor)
        except MllmAssetsError as error:
            yield dg.SkipReason(str(error))
            return
        if new is not None and cursor.get("launched") == new:
            why, new = f"{why}; a run for that was already launched and did not succeed: see the runs of {raw}", None
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


INPUTS_CHANGED = (
    dg.AutomationCondition.eager().replace("any_deps_updated", _CHANGED_UPSTREAM)
    & dg.AutomationCondition.all_deps_blocking_checks_passed()
)


def with_automation(asset: dg.AssetsDefinition) -> dg.AssetsDefinition:
    """The same asset, made automatically when the data version of an input changed, or when it is missing."""
    return asset.map_asset_specs(lambda spec: spec.replace_attributes(automation_condition=INPUTS_CHANGED))


def automation_sensor(dataset: str, assets: Sequence[dg.AssetsDefinition]) -> dg.AutomationConditionSensorDefinition:
    """The sensor that evaluates the conditions of a dataset's assets; on by default, since the YAML asks for it."""
    keys = [key for asset in assets for key in asset.keys]
    return dg.AutomationConditionSensorDefinition(
        name=f"{dataset}_automatic",
        target=dg.AssetSelection.assets(*keys),
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"Makes quality, splits and entries of {dataset} again when their inputs changed.",
    )
