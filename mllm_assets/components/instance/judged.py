"""How the gates of evaluated runs were judged, from Dagster's history: with the thresholds that held at that time."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg
from dagster._core.events import DagsterEventType

from mllm_assets.components.facts import facts_of
from mllm_assets.components.instance.home import open_instance
from mllm_assets.components.reporting import metric_gates

MOST = 200  # judgements of each gate that are read


def judged_gates(recipes: Iterable[str]) -> dict[str, dict[str, str]]:
    """For each folder of metrics, relative to the root, how each gate was judged last; empty without a DAGSTER_HOME.

    Raises:
        InstanceError: Dagster's instance does not open.
    """
    if not os.environ.get("DAGSTER_HOME"):
        return {}
    found: dict[str, dict[str, str]] = {}
    with open_instance() as instance:
        for recipe in recipes:
            folders = _folders(instance, dg.AssetKey([recipe, "eval_metrics"]))
            for gate in metric_gates():
                check = dg.AssetCheckKey(dg.AssetKey([recipe, "eval_metrics"]), gate)
                for record in instance.event_log_storage.get_asset_check_execution_history(check, MOST):
                    if (event := record.event) is None or event.dagster_event is None:
                        continue
                    if event.dagster_event.event_type != DagsterEventType.ASSET_CHECK_EVALUATION:
                        continue
                    judged = event.dagster_event.asset_check_evaluation_data
                    if folder := folders.get(event.run_id):
                        text = f"{'passed' if judged.passed else 'failed'}{_figure(facts_of(judged.metadata))}"
                        found.setdefault(folder, {}).setdefault(gate, text)
    return found


def _figure(facts: Mapping[str, Any]) -> str:
    """What was observed, with the ends of its interval where it has one."""
    if (observed := facts.get("observed")) is None:
        return ""
    ends = [facts[name] for name in ("interval_low", "interval_high") if name in facts]
    interval = ", {:z.4g} to {:z.4g}".format(*map(float, ends)) if len(ends) == 2 else ""
    return f" ({float(observed):z.4g}{interval})"


def _folders(instance: dg.DagsterInstance, key: dg.AssetKey) -> dict[str, str]:
    """The folder of metrics that each Dagster run wrote."""
    records = instance.fetch_materializations(key, limit=MOST).records
    found: dict[str, str] = {}
    for record in records:
        made = record.asset_materialization
        path = facts_of(made.metadata).get("path") if made else None
        if isinstance(path, str):
            found.setdefault(record.event_log_entry.run_id, path)
    return found
