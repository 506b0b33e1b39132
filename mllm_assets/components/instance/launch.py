"""Runs a plan of `mllm-assets run` in this process, with a line per asset, and says how it ended."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
from dagster._utils.interrupts import capture_interrupts

from mllm_assets.components.automation.retraining import failed_blocking_checks
from mllm_assets.components.instance.executor import TERMINAL
from mllm_assets.components.instance.home import open_instance
from mllm_assets.components.instance.location import Location
from mllm_assets.components.instance.run_plan import Request, RunPlan, plan_run
from mllm_assets.components.jobs import job_names
from mllm_assets.components.progress import CANCELLED
from mllm_assets.components.reporting import failed_by_checks, failure_text, is_interruption, shown_step
from mllm_assets.components.resources import all_in_this_process
from mllm_assets.components.slots import end_dead_runs
from mllm_assets.layout import Layout

IMPLICIT_JOB = "__ASSET_JOB"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a command ended.

    Attributes:
        named: The assets that were asked for, as `owner/name`.
        problems: Failed gates and checks, and failed assets; a sentence each.
        was_cancelled: By Ctrl-C or SIGTERM.
        was_made: Whether a run made anything.
    """

    named: tuple[str, ...]
    problems: tuple[str, ...] = ()
    was_cancelled: bool = False
    was_made: bool = True


def run(request: Request, project: Path, layout: Layout, *, dry_run: bool, notify: Callable[[str], None]) -> Outcome:
    """Plan, show the plan and, unless it is a dry run, make it.

    Raises:
        RecipeError: The names or values are not valid. Nothing was run.
        InstanceError: Dagster's instance does not open.
    """
    location = Location(project)
    with open_instance() as instance:
        for run_id in end_dead_runs(instance):
            notify(f"run {run_id[:8]} was killed: its slots are free")
        plan = plan_run(request, location, instance, layout)
        for line in plan.describe():
            notify(line)
        named = tuple(key.to_user_string() for key in plan.named)
        held = _why_held(plan, location, instance)
        if dry_run or not plan.reasons:
            return Outcome(named=named, problems=() if dry_run else held, was_made=False)
        return _execute(plan, named, location, instance, held)


def _why_held(plan: RunPlan, location: Location, instance: dg.DagsterInstance) -> tuple[str, ...]:
    failed = failed_blocking_checks(location.repository, instance) if plan.blocked else {}
    return tuple(
        f"{check.asset_key.to_user_string()}: {check.name} failed, and nothing changed since: {text}"
        for check, text in failed.items()
        if any(check.asset_key.to_user_string() in why for why in plan.blocked.values())
    )


def _execute(
    plan: RunPlan, named: tuple[str, ...], location: Location, instance: dg.DagsterInstance, held: tuple[str, ...]
) -> Outcome:
    with (
        capture_interrupts(),
        all_in_this_process(),
        dg.execute_job(
            location.job(_job_of(plan, location)),
            instance=instance,
            run_config={"loggers": {TERMINAL: {}}, **plan.config},
            tags=dict(plan.tags),
            asset_selection=list(plan.reasons),
            raise_on_error=False,
        ) as result,
    ):
        problems = _problems(result)
    cancelled = (
        any(CANCELLED in text for text in problems)
        or bool(result.filter_events(is_interruption))
        or result.dagster_run.status is dg.DagsterRunStatus.CANCELED
    )
    if not result.success and not problems:
        problems = ("The run ended before its first step: see the lines above.",)
    return Outcome(named=named, problems=(*problems, *held) if not result.success else held, was_cancelled=cancelled)


def _job_of(plan: RunPlan, location: Location) -> str:
    """The job of the recipe or the dataset that holds all that is to be made: a run is listed by its job's name."""
    made = set(plan.reasons)
    for owner in dict.fromkeys(key.path[0] for key in plan.named):
        for name in job_names(owner):
            if location.repository.has_job(name):
                if made <= set(location.repository.get_job(name).asset_layer.executable_asset_keys):
                    return name
    return IMPLICIT_JOB


def _problems(result: dg.JobExecutionResult) -> tuple[str, ...]:
    """The failed checks that stopped something, and the steps that failed; a step that failed by its checks once."""
    kinds = dg.DagsterEventType
    checks = [
        event.asset_check_evaluation_data
        for event in result.filter_events(lambda event: event.event_type == kinds.ASSET_CHECK_EVALUATION)
    ]
    failed = [check for check in checks if not check.passed and check.severity is dg.AssetCheckSeverity.ERROR]
    texts = [f"{check.asset_key.to_user_string()}: {check.check_name} failed: {check.description}" for check in failed]
    for event in result.filter_events(lambda event: event.event_type == kinds.STEP_FAILURE):
        if not failed_by_checks(event):
            texts.append(f"{shown_step(event)}: {failure_text(event)}")
    return tuple(texts)
