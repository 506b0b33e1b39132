"""The resources of this deployment, from its environment variables."""

import os

import dagster as dg

from mllm_assets.components.resources import AcceleratorResource, ProjectResource
from mllm_assets.layout import Layout


@dg.definitions
def resources() -> dg.Definitions:
    return dg.Definitions(
        resources={
            "project": ProjectResource(root=str(Layout.from_environment().root)),
            "gpu": AcceleratorResource(
                device=os.environ.get("MLLM_ASSETS_DEVICE", "auto"),  # pyright: ignore[reportArgumentType]
                num_processes=int(os.environ.get("MLLM_ASSETS_NUM_PROCESSES", "1")),
            ),
        }
    )
