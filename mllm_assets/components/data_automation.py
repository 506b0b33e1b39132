"""Declarative automation of what is cheap to make: a dataset's assets below its source."""

from collections.abc import Sequence

import dagster as dg

# Dagster's `eager` follows every new materialisation, one with the same content too
_CHANGED_ABOVE = dg.AutomationCondition.any_deps_updated().replace(
    "newly_updated", dg.AutomationCondition.data_version_changed()
)
INPUTS_CHANGED = (
    dg.AutomationCondition.eager().replace("any_deps_updated", _CHANGED_ABOVE)
    & dg.AutomationCondition.all_deps_blocking_checks_passed()
)


def made_when_inputs_changed(asset: dg.AssetsDefinition) -> dg.AssetsDefinition:
    """The same asset, made by itself when the data version of what is above it changed, or when it is missing."""
    return asset.map_asset_specs(lambda spec: spec.replace_attributes(automation_condition=INPUTS_CHANGED))


def automation_sensor(dataset: str, assets: Sequence[dg.AssetsDefinition]) -> dg.AutomationConditionSensorDefinition:
    """The sensor that evaluates the conditions of a dataset's assets; it is on, for the YAML asked for it."""
    keys = [key for asset in assets for key in asset.keys]
    return dg.AutomationConditionSensorDefinition(
        name=f"{dataset}_automatic",
        target=dg.AssetSelection.assets(*keys),
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"Makes quality, splits and entries of {dataset} again when what is above them changed.",
    )
