"""The decorator of every asset body: errors become one line, and a body that fails records nothing."""

import functools
import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

from mllm_assets.components.facts import as_texts, fitted
from mllm_assets.components.reporting import CHECK_FAILED, MADE_PREFIX, facts_text
from mllm_assets.components.resources import ProjectResource
from mllm_assets.data.quality.store import copied_once, table_for, utc_now
from mllm_assets.errors import MllmAssetsError
from mllm_assets.progress import progress_to
from mllm_assets.redaction import holds_secret, redacted, redacted_value
from mllm_assets.store.mirror import Mirror
from mllm_assets.worker.usage import Usage, measured

# Other machines read sources and models from where they came, and the Hub or a registry has what is sent there
NOT_MIRRORED = ("raw", "hub_model", "mlflow_model")
TEMPORARY_HOME = ".tmp_dagster_home_"  # which Dagster 1.13 makes in the working directory without a DAGSTER_HOME
_said: set[str] = set()  # the runs of this process that were told that they are forgotten
Results = dg.MaterializeResult | tuple[dg.MaterializeResult, ...]


def step(body: Callable[..., Results]) -> Callable[..., Results]:
    """Decorate an asset body, below `@dg.asset`; its first parameters are `context` and `project`.

    An error in the body fails the step as in `as_dagster_failures`. What the body returns is redacted, sent to the
    artefact store, written into the table `runs` of DuckDB, and logged, with what the body took of its machine.
    Metadata that is empty is left out.
    """

    @functools.wraps(body)  # Dagster reads the parameters off the body
    def run(context: dg.AssetExecutionContext, project: ProjectResource, **arguments: Any) -> Results:
        with as_dagster_failures(), copied_once():
            if notice := _forgotten(context.run.run_id, Path(context.instance.root_directory)):
                context.log.warning(notice)
            with progress_to(context.log.info), measured(price_per_hour=project.price_per_hour) as usage:
                returned = body(context, project=project, **arguments)
            is_one = isinstance(returned, dg.MaterializeResult)  # itself a tuple
            results = tuple(map(_redacted, (returned,) if is_one else returned))
            costs = [usage, *(Usage() for _ in results[1:])]  # of several assets the first has what all took
            results = tuple(map(_with_cost, results, costs))
            _record(context, project, results)
            results = tuple(map(_fitted, results))
        return results[0] if is_one else results

    return run


def _forgotten(run_id: str, home: Path) -> str:
    """What to say once a run, where a command of Dagster's deletes its history at its end."""
    if run_id in _said or not home.name.startswith(TEMPORARY_HOME):
        return ""
    _said.add(run_id)
    return (
        "DAGSTER_HOME is not set, so that Dagster forgets this run, and the next one makes all of it again: "
        "export DAGSTER_HOME=$PWD/.dagster_home. `mllm-assets run` keeps its history there."
    )


@contextmanager
def as_dagster_failures() -> Iterator[None]:
    """Turn our errors into step failures that show the message alone and are not retried.

    Of any other error whose text holds a secret, Dagster keeps the redacted traceback only.
    """
    try:
        yield
    except MllmAssetsError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from None
    except Exception as error:  # of whatever class: Dagster would write its text into the event log
        if not holds_secret(text := "".join(traceback.format_exception(error))):
            raise
        failure = dg.Failure(description=redacted(text), allow_retries=False)
        raise failure from None


def _with_cost(result: dg.MaterializeResult, usage: Usage) -> dg.MaterializeResult:
    return result._replace(metadata={**(result.metadata or {}), **usage.as_metadata()})


def _fitted(result: dg.MaterializeResult) -> dg.MaterializeResult:
    """As the pages of the asset and of its checks show it best."""
    checks = [check._replace(metadata=as_texts(_shown(check.metadata))) for check in result.check_results or ()]
    return result._replace(metadata=fitted(result.metadata or {}), check_results=checks)


def as_shown(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata that a step would have recorded, of an event outside of a run."""
    return fitted(_redacted_metadata(metadata))


def _redacted(result: dg.MaterializeResult) -> dg.MaterializeResult:
    return result._replace(metadata=_redacted_metadata(result.metadata or {}))


def _redacted_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _redacted_value(value) for name, value in _shown(metadata).items()}


def _shown(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if not _is_empty(value)}


def _is_empty(value: Any) -> bool:
    """Whether it would be a row of the asset's page with nothing in it; zeros and False say something."""
    if isinstance(value, dg.TableMetadataValue):
        return not value.records
    return getattr(value, "value", value) in ("", None, [], {}, ())


def _redacted_value(value: Any) -> Any:
    match value:
        case dg.TextMetadataValue(text=text):
            return dg.MetadataValue.text(redacted(text or ""))
        case dg.MarkdownMetadataValue(md_str=text):
            return dg.MetadataValue.md(redacted(text or ""))
        case dg.JsonMetadataValue(data=data):
            return dg.MetadataValue.json(redacted_value(data))
        case _:
            return redacted_value(value)


def _record(
    context: dg.AssetExecutionContext, project: ProjectResource, results: tuple[dg.MaterializeResult, ...]
) -> None:
    """Send everything that a step made before any of it counts as made: after a failed upload the step runs again."""
    keyed = [
        (dg.AssetKey.from_coercible(result.asset_key) if result.asset_key else context.asset_key, result)
        for result in results
    ]
    if mirror := project.mirror(context):
        for key, result in keyed:
            _send(mirror, key, result)
    project.quality_store.write({"runs": table_for("runs", [_row(context, key, result) for key, result in keyed])})
    for key, result in keyed:
        context.log.info(f"{MADE_PREFIX}{key.to_user_string()}: {facts_text(result.metadata or {})}")
        for check in result.check_results or ():
            if not check.passed:
                context.log.warning(f"{CHECK_FAILED}{check.check_name}: {redacted(check.description or '')}")


def _row(context: dg.AssetExecutionContext, key: dg.AssetKey, result: dg.MaterializeResult) -> dict[str, Any]:
    scalars = {name: value for name, value in (result.metadata or {}).items() if isinstance(value, str | int | float)}
    return {
        "run_id": context.run.run_id,
        "asset": key.to_user_string(),
        "digest": result.data_version.value if result.data_version else None,
        "created_at": utc_now(),
        "metadata": json.dumps(scalars),
    }


def _send(mirror: Mirror, key: dg.AssetKey, result: dg.MaterializeResult) -> None:
    """Mirror what an asset made.

    Raises:
        MllmAssetsError: The store cannot be reached, or refuses. What was made is kept; the next try sends the rest.
    """
    owner, name = key.path[0], key.path[-1]
    metadata = result.metadata or {}
    if owner == "pretrained" or name in NOT_MIRRORED:
        return
    path = getattr(metadata["path"], "value", metadata["path"])  # some show it as a link
    assert isinstance(path, str), f"{key.to_user_string()} has no path in its metadata"
    directory = mirror.layout.root / path
    match name:
        case "train":
            mirror.push_split(directory)
            mirror.push_history(owner)
        case "val" | "test":
            pass  # the same version
        case "dataset_info":
            entries = metadata["entries"]
            assert isinstance(entries, dg.JsonMetadataValue) and isinstance(entries.value, dict) and result.data_version
            mirror.push_entries(owner, result.data_version.value, entries.value)
        case "vision_features":
            mirror.push_features(owner, directory)
        case "checkpoint":
            mirror.push_run(directory)
        case "released_model":
            mirror.push(directory)
            mirror.push_current(owner)
        case _:
            mirror.push(directory)
