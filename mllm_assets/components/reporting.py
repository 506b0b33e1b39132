"""Turn domain results into what the Dagster UI shows."""

import base64
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.errors import DagsterAssetCheckFailedError
from dagster._core.events import RunFailureReason

from mllm_assets.data.curate.checks import CheckOutcome
from mllm_assets.data.quality.report import markdown_table
from mllm_assets.errors import MllmAssetsError
from mllm_assets.evaluation.gates import APPROVAL, FORGETS, GATES, KEEPS, GateResult, GateSpec
from mllm_assets.inference.addresses import BOARD_PORT, PAGES, url
from mllm_assets.layout import Layout
from mllm_assets.project.read import root_module

UNREADABLE = "mllm_assets/unreadable"
OFF = "mllm_assets/off"
HEADLINE_KEYS = tuple("num_ final_ eval_ loss accuracy already version model_path path".split())
ABSENT_WHEN_ZERO = (
    *(f"num_{kind}" for kind in ("unused", "rejected", "augmented", "copies_left_out", "duplicates", "test")),
    "already_finished",
)
# The log lines that say what became of each asset, for terminals that show no events, begin with these
MADE_PREFIX, CHECK_FAILED = "made ", "check failed: "
WINDOW_CHARS = 1000  # from which Dagster shows a value in a window of its own
MAX_TAG_LENGTH = 63  # Dagster's, of a tag's value
RELOADS = "checkpoint_reloads_strictly"


def counts_table(counts: Mapping[str, int], name: str) -> dg.MarkdownMetadataValue:
    """Counts as a table of two columns, largest first."""
    rows = sorted(counts.items(), key=lambda item: -item[1])
    return in_window(markdown_table((name, "samples"), rows))


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> dg.TableMetadataValue:
    """Rows as a table; `columns` gives the order and the types, so that an empty table still renders."""
    schema = dg.TableSchema([dg.TableColumn(name, kind) for name, kind in columns.items()])
    records = [dg.TableRecord({name: row[name] for name in columns}) for row in rows]
    return dg.MetadataValue.table(records, schema=schema)


def check_results(
    key: dg.AssetKey, outcomes: Mapping[str, CheckOutcome], *, only_warn: Collection[str] = ()
) -> list[dg.AssetCheckResult]:
    """Outcomes as Dagster's; one that only warns does not stop what is downstream."""
    return [
        dg.AssetCheckResult(
            asset_key=key,
            check_name=name,
            passed=outcome.passed,
            description=outcome.description,
            metadata=dict(outcome.metadata),
            severity=dg.AssetCheckSeverity.WARN if name in only_warn else dg.AssetCheckSeverity.ERROR,
        )
        for name, outcome in outcomes.items()
    ]


def in_line(spec: dg.AssetSpec, owner: str) -> dg.AssetSpec:
    """Group an asset by its dataset or recipe; the stage, which its definition has as its group, becomes a tag."""
    return spec.merge_attributes(tags={"stage": spec.group_name or ""}).replace_attributes(group_name=owner)


def failing_asset(key: dg.AssetKey, error: MllmAssetsError) -> dg.AssetsDefinition:
    """An asset instead of one that cannot be built: it is in the graph, and fails with the message."""
    message = str(error)

    @dg.asset(
        key=key,
        group_name=f"{key.path[0]}_broken",  # which a collapsed group shows too
        kinds={"broken"},
        description=f"Cannot be built: {message}",
        tags={UNREADABLE: ""},
    )
    def unreadable() -> dg.MaterializeResult:
        raise dg.Failure(description=message, allow_retries=False)

    return unreadable


def rounded(value: float) -> float:
    """A number with five significant digits, for display; the artefact keeps all."""
    return float(f"{value:.5g}")


def in_window(markdown: str) -> dg.MarkdownMetadataValue:
    """Markdown that the UI shows in a window behind "Show Markdown", as it does from 1,000 characters.

    At 1280 px the column of values is 300 px wide, the window 1000. "" stays empty.
    """
    return dg.MetadataValue.md(markdown and markdown.ljust(WINDOW_CHARS, "\n"))


def with_page(page: Path, markdown: str, layout: Layout) -> dg.MarkdownMetadataValue:
    """A window whose first line says where the whole is.

    A browser follows no link from Dagster to a file; the board serves the page, where it is installed.
    """
    text = f"All of them, as a page to open in a browser: `{page}`"
    if find_spec("gradio"):
        address = f"{url('127.0.0.1', BOARD_PORT)}{PAGES}{layout.relative(page)}"
        text = f"[All of them, as a page]({address}), while `mllm-assets board` runs on this machine. Without: `{page}`"
    return in_window(f"{text}\n\n{markdown}")


def png_markdown(name: str, png: bytes) -> str:
    """A picture inside the metadata."""
    return f"![{name}](data:image/png;base64,{base64.b64encode(png).decode()})"


def load_project(folder: Path) -> dg.Definitions:
    """The definitions of the project in a folder.

    Raises:
        RecipeError: The folder has no project.
        MachineError: A setting of the deployment is not valid.
    """
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # a project need not be installed; dg and dagster do the same
    try:
        return dg.load_from_defs_folder(path_within_project=folder / root_module(folder))
    except Exception as error:  # Dagster's wrapper has no public class
        if isinstance(error.__cause__, MllmAssetsError):
            raise error.__cause__ from None
        raise


def innermost(error: BaseException) -> BaseException:
    """What an error was raised from in the end: Dagster wraps those of a project's files."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def unreadable_assets(definitions: dg.Definitions) -> dict[str, str]:
    """Key and message of each asset that cannot be built."""
    specs = definitions.resolve_all_asset_specs()
    return {spec.key.to_user_string(): spec.description or "" for spec in specs if UNREADABLE in spec.tags}


def failure_text(event: dg.DagsterEvent) -> str:
    """The message of a failed step: that of our `dg.Failure`, otherwise of the innermost error."""
    data = event.step_failure_data
    if data.user_failure_data and data.user_failure_data.description:
        return data.user_failure_data.description
    error = data.error
    while error and error.cause:
        error = error.cause
    return error.message.strip() if error else event.message or "no message"


def failed_by_checks(event: dg.DagsterEvent) -> bool:
    """Whether a step failed by its blocking checks, each of which has an event of its own with what it found."""
    error = event.step_failure_data.error
    return error is not None and error.cls_name == DagsterAssetCheckFailedError.__name__


def is_interruption(event: dg.DagsterEvent) -> bool:
    """Whether a run ended by Ctrl-C or SIGTERM, in a step or between two, which Dagster records as a failure."""
    return (
        event.event_type == dg.DagsterEventType.RUN_FAILURE
        and event.job_failure_data.failure_reason is RunFailureReason.UNEXPECTED_TERMINATION
    )


def shown_step(event: dg.DagsterEvent) -> str:
    """A step's name as its asset's: `emoji_sft/checkpoint`."""
    return (event.step_key or "").replace("__", "/", 1)


def facts_text(metadata: Mapping[str, Any]) -> str:
    """The part of an asset's metadata that a terminal shows, on one line; of what seldom happens, only what did."""
    facts = {name: getattr(value, "value", value) for name, value in metadata.items() if name.startswith(HEADLINE_KEYS)}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in facts.items()
        if isinstance(value, int | float | str) and (value or name not in ABSENT_WHEN_ZERO)
    )


def link(address: str) -> dg.MetadataValue:
    """A link to a page, or a path on this machine."""
    is_page = address.startswith(("http://", "https://"))
    return dg.MetadataValue.url(address) if is_page else dg.MetadataValue.path(address)


def metric_gates(spec: GateSpec | None = None) -> list[str]:
    """What `eval_metrics` can judge, or does with these thresholds."""
    asked = {APPROVAL: spec is None or spec.approval == "required"}
    asked |= {RELOADS: False, FORGETS: spec is None or spec.max_forgetting_nats is not None}
    asked |= {KEEPS: spec is None or spec.max_benchmark_loss is not None}
    return [name for name in GATES if asked.get(name, True)]


def gate_specs(key: dg.AssetKey, names: Iterable[str]) -> list[dg.AssetCheckSpec]:
    return [dg.AssetCheckSpec(name, asset=key, blocking=True, description=GATES[name].claim) for name in names]


def gate_checks(results: Sequence[GateResult], names: Iterable[str]) -> list[dg.AssetCheckResult]:
    """Results as Dagster's; a gate without a result, because nothing is released yet, passes."""
    judged = {result.name: result for result in results}
    return [_check(name, judged.get(name)) for name in names]


def _check(name: str, result: GateResult | None) -> dg.AssetCheckResult:
    if result is None:
        text = "This recipe has no release yet."
        return dg.AssetCheckResult(check_name=name, passed=True, description=text)
    figures = {
        "observed": result.observed,
        "interval_low": result.low,
        "interval_high": result.high,
        "threshold": result.threshold,
    }
    return dg.AssetCheckResult(
        check_name=name,
        passed=result.passed,
        severity=dg.AssetCheckSeverity.ERROR if result.required else dg.AssetCheckSeverity.WARN,
        description=result.description,
        metadata={figure: value for figure, value in figures.items() if value is not None},
    )
