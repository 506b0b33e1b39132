"""`make demo`: the whole line of `emoji_sft` in one process, with one readable line an asset."""

import dagster as dg

from mllm_assets.components.terminal import one_line_per_asset
from mllm_assets.components.waiting import patient_in_process_executor


@dg.definitions
def demo() -> dg.Definitions:
    job = dg.define_asset_job(
        "emoji_demo",
        selection='+key:"emoji_sft/released_model"',
        description="Raw emoji images to a released model, on one machine without a network.",
        executor_def=patient_in_process_executor,
        config={"loggers": {"for_people": {}}},
    )
    return dg.Definitions(jobs=[job], loggers={"for_people": one_line_per_asset})
