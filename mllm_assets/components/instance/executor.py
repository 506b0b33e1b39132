"""An in-process executor that says what it waits for and can be stopped meanwhile, and a log for the terminal.

Dagster's own polls for a pool's slot without a pause, defers SIGTERM and Ctrl-C, and does not log who holds the slot.
Its multiprocess executor can be stopped, but takes two seconds to start each step.

Not covered: the module uses names of `dagster._core` (1.13), which may move; a test runs it.
"""

import logging
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import dagster as dg
from dagster._core.execution.api import ExecuteRunWithPlanIterable
from dagster._core.execution.context.system import PlanExecutionContext, PlanOrchestrationContext
from dagster._core.execution.context_creation_job import PlanExecutionContextManager
from dagster._core.execution.plan.execute_plan import inner_plan_execution_iterator
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.retries import RetryMode
from dagster._core.executor.in_process import InProcessExecutor
from dagster._utils.interrupts import check_captured_interrupt

from mllm_assets.components.facts import facts_of
from mllm_assets.components.reporting import (
    CHECK_FAILED,
    MADE_PREFIX,
    facts_text,
    failed_by_checks,
    failure_text,
    is_interruption,
    shown_step,
)
from mllm_assets.components.slots import describe_holders
from mllm_assets.data.quality.store import copied_once

POLL_EVERY_S = 0.5
TERMINAL = "terminal"  # the logger's name in a run's configuration
# Events show what the last three say
HIDDEN_PREFIXES = ("[pipes]", MADE_PREFIX, CHECK_FAILED, "Dependencies for step")


class PatientClaims(InstanceConcurrencyContext):
    """Polls for a pool's slot with pauses, logs who holds it, and handles Ctrl-C and SIGTERM in between."""

    def __init__(self, context: PlanExecutionContext) -> None:
        super().__init__(context.instance, context.dagster_run)
        self._context = context
        self._logged: set[str] = set()

    def claim(self, concurrency_key: str, step_key: str, step_priority: int = 0) -> bool:
        if super().claim(concurrency_key, step_key, step_priority):
            return True
        if check_captured_interrupt():
            raise dg.DagsterExecutionInterruptedError(
                f"Stopped while {step_key} waited for the pool {concurrency_key}."
            )
        holders = describe_holders(self._context.instance, concurrency_key)
        if holders not in self._logged:
            self._logged.add(holders)
            self._context.log.warning(f"{step_key} waits for a slot of the pool {concurrency_key}: {holders}")
        time.sleep(POLL_EVERY_S)
        return False


class PatientInProcessExecutor(InProcessExecutor):
    """Dagster's in-process executor with `PatientClaims`."""

    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[dg.DagsterEvent]:
        run = ExecuteRunWithPlanIterable(
            execution_plan=plan_context.execution_plan,
            iterator=_steps,
            execution_context_manager=PlanExecutionContextManager(
                job=plan_context.job,
                retry_mode=plan_context.retry_mode,
                execution_plan=plan_context.execution_plan,
                run_config=plan_context.run_config,
                dagster_run=plan_context.dagster_run,
                instance=plan_context.instance,
                raise_on_error=plan_context.raise_on_error,
                output_capture=plan_context.output_capture,
                step_dependency_config=self.step_dependency_config,
            ),
        )
        yield from iter(run)


def _steps(job_context: PlanExecutionContext, execution_plan: ExecutionPlan) -> Iterator[dg.DagsterEvent]:
    with PatientClaims(job_context) as claims, copied_once():
        steps = inner_plan_execution_iterator(job_context, execution_plan, claims)
        # The first event starts the processes that mirror the output, and they inherit what is blocked: Ctrl-C on a
        # terminal reaches them too, and ended them before the last lines, with two tracebacks
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            first = next(steps)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield first
        yield from steps


@dg.executor(name="in_process", config_schema={})
def patient_in_process_executor(_: Any) -> PatientInProcessExecutor:
    """All steps in one process, like Dagster's `in_process_executor`; logs who holds the slot that a step waits for."""
    return PatientInProcessExecutor(retries=RetryMode.ENABLED)


class OneLinePerAsset(logging.Handler):
    """Prints what a user watches; the event log has everything."""

    def emit(self, record: logging.LogRecord) -> None:
        meta = getattr(record, "dagster_meta", None) or {}
        event = meta.get("dagster_event")
        if event is not None:
            line = describe(event)
        elif record.levelno >= logging.INFO:
            text = meta.get("orig_message") or record.getMessage()
            line = None if text.startswith(HIDDEN_PREFIXES) else textwrap.indent(text, " " * 6)
        else:
            line = None
        if line:
            print(line, file=sys.stderr, flush=True)


def describe(event: dg.DagsterEvent) -> str | None:
    """The line for one event, or None for an event that is not shown."""
    kind = event.event_type
    if kind == dg.DagsterEventType.STEP_START:
        return f"  ... {shown_step(event)}"
    if kind == dg.DagsterEventType.ASSET_MATERIALIZATION:
        materialization = event.step_materialization_data.materialization
        return f"  ok  {materialization.asset_key.to_user_string()}  {facts_text(facts_of(materialization.metadata))}"
    if kind == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
        check = event.asset_check_evaluation_data
        text = check.description or ""
        return f"      {'passed' if check.passed else 'FAILED'}  {check.check_name}: {text}"
    if kind == dg.DagsterEventType.STEP_FAILURE:
        return None if failed_by_checks(event) else f"  FAILED  {shown_step(event)}: {failure_text(event)}"
    if (
        kind == dg.DagsterEventType.RUN_FAILURE
        and not is_interruption(event)
        and "Steps failed" not in (event.message or "")
    ):
        return f"  FAILED  {event.message or 'the run failed'}"
    return None


@dg.logger(
    config_schema={"log_level": dg.Field(str, is_required=False, default_value="DEBUG")},
    description="One line per asset, for a terminal.",
)
def one_line_per_asset(init: dg.InitLoggerContext) -> logging.Logger:
    """Make the logger that `mllm-assets run` uses."""
    logger = logging.Logger("mllm_assets", level=init.logger_config["log_level"].upper())
    logger.addHandler(OneLinePerAsset())
    return logger
