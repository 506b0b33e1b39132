"""Dagster's part of `mllm-assets doctor`: the project's definitions, and the instance's pools and runs."""

import os
from pathlib import Path

import dagster as dg

from mllm_assets.components.instance.home import InstanceError, open_instance
from mllm_assets.components.pretrained_model import PretrainedModels
from mllm_assets.components.reporting import innermost, load_project, unreadable_assets
from mllm_assets.components.slots import find_dead_runs, find_leftover_holders
from mllm_assets.layout import Layout
from mllm_assets.operations.findings import Finding
from mllm_assets.operations.machine import HubModel
from mllm_assets.safe_yaml import load_all

POOL = "gpu"
LIMIT = "concurrency: {pools: {default_limit: 1}}"


def check_dagster(project: Path, layout: Layout) -> tuple[list[Finding], list[HubModel]]:
    """Check the project in a folder and the instance of DAGSTER_HOME; return also the declared models of the Hub."""
    definitions, models = _check_definitions(project, layout)
    return [definitions, *_check_instance(project)], models


def _check_definitions(project: Path, layout: Layout) -> tuple[Finding, list[HubModel]]:
    step = "mllm-assets check-graph, in the folder of the project"
    try:
        definitions = load_project(project)
        unreadable = unreadable_assets(definitions)
        tree = dg.ComponentTree.for_project(project)
        models = [
            HubModel(repo=model.repo, revision=model.revision, directory=layout.root / model.directory)
            for component in tree.get_all_components(of_type=PretrainedModels)
            for model in component.models
            if model.kind == "huggingface"
        ]
    except Exception as error:  # the project's own files can raise anything
        first = (str(innermost(error)).strip().splitlines() or [type(error).__name__])[0]
        return Finding("definitions", "fail", f"{project} does not load: {first}", step), []
    if unreadable:
        listed = "; ".join(f"{key}: {message}" for key, message in unreadable.items())
        return Finding("definitions", "fail", listed, step), models
    num_assets = len(definitions.resolve_all_asset_keys())
    return Finding("definitions", "ok", f"{num_assets} assets"), models


def _check_instance(project: Path) -> list[Finding]:
    home = os.environ.get("DAGSTER_HOME")
    if not home:
        step = "export DAGSTER_HOME=$PWD/.dagster_home, with dagster.yaml in it (`make dev` makes both)."
        unset = Finding("instance", "warn", "DAGSTER_HOME is not set: only mllm-assets run keeps its history", step)
        return [unset, _pool_finding(_limit_in(project / "dagster.yaml"), project)]
    try:
        with open_instance() as instance:
            finding = Finding("instance", "ok", f"{home}, {instance.get_runs_count()} runs")
            limits = {pool.name: pool.limit for pool in instance.event_log_storage.get_pool_limits()}
            default = instance.get_concurrency_config().pool_config.default_pool_limit
            return [finding, _pool_finding(limits.get(POOL, default), Path(home)), _check_slots(instance)]
    except InstanceError as error:
        return [Finding("instance", "fail", error.problem, error.next_step)]


def _pool_finding(limit: int | None, folder: Path) -> Finding:
    check = f"pool {POOL}"
    if limit is None:
        step = f"Put `{LIMIT}` into {folder / 'dagster.yaml'}."
        return Finding(check, "fail", "no limit is configured, so two trainings would share the device", step)
    return Finding(check, "ok", f"{limit} at a time")


def _limit_in(settings: Path) -> int | None:
    """The pool limit that a temporary instance reads from the working directory."""
    if not settings.is_file():
        return None
    [values] = load_all(settings) or [{}]
    return (((values or {}).get("concurrency") or {}).get("pools") or {}).get("default_limit")


def _check_slots(instance: dg.DagsterInstance) -> Finding:
    dead = [run.run_id[:8] for run in find_dead_runs(instance)]
    left = [run_id[:8] for run_id in find_leftover_holders(instance)]
    if not dead and not left:
        return Finding("slots", "ok", "no killed run holds a slot")
    parts = []
    if dead:
        parts.append(f"killed and still counted as running: {', '.join(dead)}")
    if left:
        parts.append(f"ended and still holding a slot: {', '.join(left)}")
    return Finding("slots", "warn", "; ".join(parts), "mllm-assets slots free")
