"""The sensor that posts each failed run to a webhook."""

from collections.abc import Collection
from typing import Any

import dagster as dg

from mllm_assets.components.automation.retraining import RETRAINING_TAG
from mllm_assets.components.reporting import failed_by_checks, failure_text
from mllm_assets.errors import MllmAssetsError
from mllm_assets.hub.errors import scrubbed
from mllm_assets.operations.alerts import WEBHOOK_VARIABLE, post_alert, run_link, webhook_url

MAX_ERROR_CHARS = 2000
NO_WEBHOOK = f"No alert is sent: {WEBHOOK_VARIABLE} is not set where the code location runs."


def failure_alert(recipes: Collection[str]) -> dg.SensorDefinition:
    """Build the sensor, on by default where the webhook's variable is set; an alert names which of `recipes` failed."""
    status = dg.DefaultSensorStatus.RUNNING if webhook_url() else dg.DefaultSensorStatus.STOPPED

    @dg.run_failure_sensor(
        name="failure_alert",
        minimum_interval_seconds=15,
        default_status=status,
        description=f"Posts each failed run as JSON to the address in {WEBHOOK_VARIABLE}.",
    )
    def sensor(context: dg.RunFailureSensorContext):
        url = webhook_url()
        if not url:
            return dg.SkipReason(NO_WEBHOOK)
        try:
            post_alert(url, describe_failure(context, recipes))
        except MllmAssetsError as error:
            raise dg.Failure(description=str(error)) from None  # the tick shows it; the next failed run is not held up
        return None

    return sensor


def describe_failure(context: dg.RunFailureSensorContext, recipes: Collection[str]) -> dict[str, Any]:
    """The alert for a failed run; `text` has all of it in one line, as chat programs show it."""
    run, failures = context.dagster_run, context.get_step_failure_events()
    step = failures[0].step_key if failures else None
    error = _error_text(failures[0], context) if failures else context.failure_event.message or "The run failed."
    error = scrubbed(error)[:MAX_ERROR_CHARS]
    first = (step or "").partition("__")[0]
    recipe = first if first in recipes else run.tags.get(RETRAINING_TAG)
    link = run_link(run.run_id)
    where = f"{step} of run {run.run_id[:8]}" if step else f"Run {run.run_id[:8]}"
    return {
        "event": "run_failed",
        "run_id": run.run_id,
        "job": run.job_name,
        "recipe": recipe,
        "step": step,
        "num_failed_steps": len(failures),
        "error": error,
        "link": link,
        "text": f"{where} failed: {error} {link}",
    }


def _error_text(event: dg.DagsterEvent, context: dg.RunFailureSensorContext) -> str:
    if failed_by_checks(event):
        return _failed_checks(context, event.step_key)
    return failure_text(event)


def _failed_checks(context: dg.RunFailureSensorContext, step_key: str | None) -> str:
    """Each blocking check that failed in a step, with its description; Dagster's error gives only their names."""
    failed = []
    for record in context.instance.all_logs(
        context.dagster_run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION
    ):
        check = record.get_dagster_event().asset_check_evaluation_data
        stops = check.blocking and check.severity is dg.AssetCheckSeverity.ERROR
        if record.step_key == step_key and stops and not check.passed:
            why = f": {check.description}" if check.description else ""
            failed.append(f"{check.check_name} of {check.asset_key.to_user_string()}{why}")
    return f"{'check' if len(failed) == 1 else f'{len(failed)} checks'} failed: {'; '.join(failed)}"
