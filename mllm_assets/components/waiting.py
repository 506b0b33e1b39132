"""An in-process executor that says what it waits for, and can be stopped while it waits.

Dagster's own asks for a pool's slot again and again without a pause, keeps SIGTERM and Ctrl-C for later, and writes one
line that does not say who holds the slot. Its multiprocess executor can be stopped; the in-process one saves the two
seconds that each step of the other takes to start.

Not covered: the module builds on names of `dagster._core` (1.13), which may move; a test runs it.
"""

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

from mllm_assets.components.slots import describe_holders

ASK_EVERY_S = 0.5


class PatientClaims(InstanceConcurrencyContext):
    """Claims a pool's slot at a walking pace, names who holds it, and hears Ctrl-C and SIGTERM in between."""

    def __init__(self, context: PlanExecutionContext) -> None:
        super().__init__(context.instance, context.dagster_run)
        self._context = context
        self._said: set[str] = set()

    def claim(self, concurrency_key: str, step_key: str, step_priority: int = 0) -> bool:
        if super().claim(concurrency_key, step_key, step_priority):
            return True
        if check_captured_interrupt():
            raise dg.DagsterExecutionInterruptedError(
                f"Stopped while {step_key} waited for the pool {concurrency_key}."
            )
        holders = describe_holders(self._context.instance, concurrency_key)
        if holders not in self._said:
            self._said.add(holders)
            self._context.log.warning(f"{step_key} waits for a slot of the pool {concurrency_key}: {holders}")
        time.sleep(ASK_EVERY_S)
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
    with PatientClaims(job_context) as claims:
        yield from inner_plan_execution_iterator(job_context, execution_plan, claims)


@dg.executor(name="in_process", config_schema={})
def patient_in_process_executor(_: Any) -> PatientInProcessExecutor:
    """All steps in one process, as Dagster's `in_process_executor`; while a step waits for a pool it says for whom."""
    return PatientInProcessExecutor(retries=RetryMode.ENABLED)
