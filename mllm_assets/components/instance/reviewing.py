"""People's decisions about samples, kept with the project and told to Dagster, so that splits are outdated at once."""

import os
from collections.abc import Sequence

import dagster as dg
from dagster._core.definitions.data_version import DATA_VERSION_TAG

from mllm_assets.components.assets.corrections import corrections_metadata
from mllm_assets.components.assets.step import as_shown
from mllm_assets.components.instance.home import open_instance
from mllm_assets.data.curate.corrected import check_answers, find_source, settle
from mllm_assets.data.curate.corrections import Correction, add_corrections
from mllm_assets.layout import Layout


def record(layout: Layout, dataset: str, corrections: Sequence[Correction]) -> None:
    """Add decisions, and let the asset `<dataset>/corrections` have them without a run.

    Raises:
        DataError: The dataset was never made, there is nothing to undo, or an answer cannot be trained on.
        IntegrityError: The file of decisions is damaged.
        InstanceError: Dagster's instance does not open; the decisions are kept.
    """
    spec, raw = find_source(layout, dataset)
    check_answers(spec, raw, corrections)
    add_corrections(layout, dataset, corrections)
    if not os.environ.get("DAGSTER_HOME"):
        return
    key = dg.AssetKey([dataset, "corrections"])
    with open_instance() as instance:
        event = instance.get_latest_materialization_event(key)
        if event is None or event.asset_materialization is None:
            return
        result = settle(spec, layout, raw)
        instance.report_runless_asset_event(
            dg.AssetMaterialization(
                asset_key=key,
                description="Decided without a run.",
                metadata=as_shown(corrections_metadata(result, layout, dataset)),
                # with the same source and definition as before: what else changed still counts as changed
                tags={**(event.asset_materialization.tags or {}), DATA_VERSION_TAG: result.digest},
            )
        )
