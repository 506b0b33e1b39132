"""The sensor that tells a webhook of each run that failed."""

from collections.abc import Collection
from typing import Any

import dagster as dg
from dagster._core.errors import DagsterAssetCheckFailedError

from mllm_assets.alerts import WEBHOOK_VARIABLE, post_alert, run_link, webhook_url
from mllm_assets.components.retraining import RETRAINING_TAG
from mllm_assets.errors import MllmAssetsError
from mllm_assets.hub_errors import scrubbed

MAX_ERROR_CHARS = 2000
NO_WEBHOOK = f"No alert is sent: {WEBHOOK_VARIABLE} is not set where the code location runs."


def failure_alert(recipes: Collection[str]) -> dg.SensorDefinition:
    """Build the sensor; it runs by itself wherever the webhook's variable is set.

    Args:
        recipes: Names, by which an alert says whose run failed.
    """
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
    """What an alert says of a failed run; `text` is the whole in one line, as chat programs show it."""
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
    """The message that was written for people, where there is one, otherwise the error's own."""
    data = event.step_failure_data
    if data.user_failure_data is not None and data.user_failure_data.description:
        return data.user_failure_data.description
    error = data.error
    if error is not None and error.cls_name == DagsterAssetCheckFailedError.__name__:
        return _failed_checks(context, event.step_key)
    while error is not None and error.cause is not None:
        error = error.cause
    return error.message.strip() if error is not None else "no message"


def _failed_checks(context: dg.RunFailureSensorContext, step_key: str | None) -> str:
    """Each blocking check that failed in a step, with what it says; Dagster's error gives their names alone."""
    told = []
    for record in context.instance.all_logs(
        context.dagster_run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION
    ):
        check = record.get_dagster_event().asset_check_evaluation_data
        stops = check.blocking and check.severity is dg.AssetCheckSeverity.ERROR
        if record.step_key == step_key and stops and not check.passed:
            said = f": {check.description}" if check.description else ""
            told.append(f"{check.check_name} of {check.asset_key.to_user_string()}{said}")
    return f"{'check' if len(told) == 1 else f'{len(told)} checks'} failed: {'; '.join(told)}"
