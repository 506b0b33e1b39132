"""A log for people: one line an asset, its facts, its checks and its progress, in place of Dagster's event stream."""

import logging
import sys
import textwrap

import dagster as dg

from mllm_assets.components.reporting import CHECK_FAILED, MADE, facts_text

NOT_FOR_PEOPLE = ("[pipes]", MADE, CHECK_FAILED)  # the last two are said of the events


class OneLinePerAsset(logging.Handler):
    """Print what a person watches; everything is in the event log all the same."""

    def emit(self, record: logging.LogRecord) -> None:
        meta = getattr(record, "dagster_meta", None) or {}
        event = meta.get("dagster_event")
        if event is not None:
            line = describe(event)
        elif record.levelno >= logging.INFO:
            text = meta.get("orig_message") or record.getMessage()
            line = None if text.startswith(NOT_FOR_PEOPLE) else textwrap.indent(text, " " * 6)
        else:
            line = None
        if line:
            print(line, file=sys.stderr, flush=True)


def describe(event: dg.DagsterEvent) -> str | None:
    """The line for one event, or None where there is nothing to say."""
    kind = event.event_type
    if kind == dg.DagsterEventType.STEP_START:
        return f"  ... {event.step_key}"
    if kind == dg.DagsterEventType.ASSET_MATERIALIZATION:
        materialization = event.step_materialization_data.materialization
        return f"  ok  {materialization.asset_key.to_user_string()}  {facts_text(materialization.metadata)}"
    if kind == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
        check = event.asset_check_evaluation_data
        text = check.description or ""
        return f"      {'passed' if check.passed else 'FAILED'}  {check.check_name}: {text}"
    if kind in (dg.DagsterEventType.STEP_FAILURE, dg.DagsterEventType.RUN_FAILURE):
        return f"  FAILED  {_failure(event)}"
    return None


def _failure(event: dg.DagsterEvent) -> str:
    if event.event_type != dg.DagsterEventType.STEP_FAILURE:
        return event.message or "the run failed"
    data = event.step_failure_data
    if data.user_failure_data and data.user_failure_data.description:
        return f"{event.step_key}: {data.user_failure_data.description}"
    error = data.error
    while error and error.cause:
        error = error.cause
    return f"{event.step_key}: {error.message.strip() if error else event.message}"


@dg.logger(
    config_schema={"log_level": dg.Field(str, is_required=False, default_value="DEBUG")},
    description="One line an asset, for people at a terminal.",
)
def one_line_per_asset(init: dg.InitLoggerContext) -> logging.Logger:
    """Make the logger that `emoji_demo` uses."""
    logger = logging.Logger("mllm_assets", level=init.logger_config["log_level"].upper())
    logger.addHandler(OneLinePerAsset())
    return logger
