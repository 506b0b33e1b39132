"""Turn domain results into what the Dagster UI shows."""

import base64
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from mllm_assets.data.checks import CheckOutcome
from mllm_assets.errors import MllmAssetsError
from mllm_assets.project.read import root_module

UNREADABLE = "mllm_assets/unreadable"
TOLD = ("num_", "final_", "eval_", "loss", "accuracy", "already", "version", "model_path", "report_path", "path")
# How the lines begin that say of every asset what came of it, for terminals that show no events
MADE, CHECK_FAILED = "made ", "check failed: "
MAX_TAG_LENGTH = 63  # Dagster's, of a tag's value


def counts_table(counts: Mapping[str, int], name: str) -> dg.TableMetadataValue:
    """Counts as a table of two columns, the largest first."""
    rows = [{name: key, "num_samples": count} for key, count in sorted(counts.items(), key=lambda item: -item[1])]
    return table(rows, {name: "string", "num_samples": "int"})


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


def failing_asset(key: dg.AssetKey, group: str, error: MllmAssetsError) -> dg.AssetsDefinition:
    """An asset in place of one whose YAML cannot be read: it is there, and fails with the message."""
    message = str(error)

    @dg.asset(key=key, group_name=group, description=f"Cannot be built: {message}", tags={UNREADABLE: ""})
    def unreadable() -> dg.MaterializeResult:
        raise dg.Failure(description=message, allow_retries=False)

    return unreadable


def shown(value: float) -> float:
    """A number as people read it; the artefact keeps all its digits."""
    return float(f"{value:.5g}")


def image_markdown(path: Path) -> dg.MarkdownMetadataValue:
    """A PNG inside the metadata; the UI shows it behind "Show Markdown"."""
    return dg.MetadataValue.md(f"![{path.stem}](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})")


def load_project(folder: Path) -> dg.Definitions:
    """The definitions of the project in a folder.

    Raises:
        RecipeError: There is no project.
        MachineError: A setting of the deployment is mistyped.
    """
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # a project need not be installed; dg and dagster do the same
    try:
        return dg.load_from_defs_folder(path_within_project=folder / root_module(folder))
    except Exception as error:  # Dagster's wrapper has no public class
        if isinstance(error.__cause__, MllmAssetsError):
            raise error.__cause__ from None
        raise


def unreadable_assets(definitions: dg.Definitions) -> dict[str, str]:
    """Key and message of each asset that stands in place of one that cannot be built."""
    specs = definitions.resolve_all_asset_specs()
    return {spec.key.to_user_string(): spec.description or "" for spec in specs if UNREADABLE in spec.tags}


def facts_text(metadata: Mapping[str, Any]) -> str:
    """The pieces of an asset's metadata that a terminal shows, on one line."""
    plain = {name: getattr(value, "value", value) for name, value in metadata.items() if name.startswith(TOLD)}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in plain.items()
        if isinstance(value, int | float | str)
    )


def link(address: str) -> dg.MetadataValue:
    """A page to open, or the path of something on this machine."""
    is_page = address.startswith(("http://", "https://"))
    return dg.MetadataValue.url(address) if is_page else dg.MetadataValue.path(address)
