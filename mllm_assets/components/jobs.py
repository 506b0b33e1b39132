"""A job for each recipe and dataset: its line of assets, from the sources to the last one."""

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from mllm_assets.components.automation.retraining import RETRAINING_JOB
from mllm_assets.components.instance.executor import TERMINAL, one_line_per_asset, patient_in_process_executor

LOGGERS = {TERMINAL: one_line_per_asset}


def job_names(owner: str) -> tuple[str, str]:
    """The name of a recipe's or a dataset's job, and the one that it has where the first is taken."""
    return owner, f"{owner}_line"


def line_job(last: dg.AssetKey, description: str, taken: set[str]) -> UnresolvedAssetJobDefinition:
    """Everything up to an asset, in one process: a step then starts in milliseconds, not in seconds."""
    name, other = job_names(last.path[0])
    return dg.define_asset_job(
        other if name in {RETRAINING_JOB, *taken} else name,
        selection=dg.AssetSelection.assets(last).upstream() & dg.AssetSelection.all(),
        executor_def=patient_in_process_executor,
        description=description,
    )
