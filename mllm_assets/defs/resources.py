"""The resources of this deployment, from its environment variables."""

import os

import dagster as dg

from mllm_assets.components.resources import AcceleratorResource, ProjectResource, RayCluster
from mllm_assets.layout import Layout
from mllm_assets.training.ray_jobs import DEFAULT_ADDRESS


@dg.definitions
def resources() -> dg.Definitions:
    layout = Layout.from_environment()
    ray = RayCluster(
        address=os.environ.get("RAY_ADDRESS", DEFAULT_ADDRESS),
        num_cpus=float(os.environ.get("MLLM_ASSETS_RAY_NUM_CPUS", "1")),
        num_gpus=float(os.environ.get("MLLM_ASSETS_RAY_NUM_GPUS", "0")),
        num_workers=int(os.environ.get("MLLM_ASSETS_RAY_NUM_WORKERS", "1")),
        jobs_dir=str(layout.ray_jobs),
    )
    return dg.Definitions(
        resources={
            "project": ProjectResource(root=str(layout.root), store=os.environ.get("MLLM_ASSETS_STORE", "")),
            "gpu": AcceleratorResource(
                device=os.environ.get("MLLM_ASSETS_DEVICE", "auto"),  # pyright: ignore[reportArgumentType]
                num_processes=int(os.environ.get("MLLM_ASSETS_NUM_PROCESSES", "1")),
                launcher=os.environ.get("MLLM_ASSETS_LAUNCHER", "local"),  # pyright: ignore[reportArgumentType]
                ray=ray,
                max_retries=int(os.environ.get("MLLM_ASSETS_MAX_RETRIES", "2")),
            ),
        }
    )
