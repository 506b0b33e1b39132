"""The resources of this deployment, from its environment variables."""

import os

import dagster as dg

from mllm_assets.components.resources import (
    AcceleratorResource,
    ProjectResource,
    RayAcceleratorResource,
    RayCluster,
    as_set,
)
from mllm_assets.layout import Layout
from mllm_assets.settings import LAUNCHERS, choice, device_from_environment, number
from mllm_assets.worker.ray_jobs import DEFAULT_ADDRESS


@dg.definitions
def resources() -> dg.Definitions:
    layout = Layout.from_environment()
    return dg.Definitions(
        resources={
            "project": as_set(
                ProjectResource(
                    root=str(layout.root),
                    store=os.environ.get("MLLM_ASSETS_STORE", ""),
                    price_per_hour=number("MLLM_ASSETS_PRICE_PER_HOUR", 0.0, least=0.0, kind=float),
                )
            ),
            "gpu": as_set(_on_ray(layout) if choice("MLLM_ASSETS_LAUNCHER", LAUNCHERS) == "ray" else _here()),
        }
    )


def _here() -> AcceleratorResource:
    return AcceleratorResource(
        device=device_from_environment(),  # pyright: ignore[reportArgumentType]
        num_processes=number("MLLM_ASSETS_NUM_PROCESSES", 1, least=1, kind=int),
        max_retries=number("MLLM_ASSETS_MAX_RETRIES", 2, least=0, kind=int),
    )


def _on_ray(layout: Layout) -> RayAcceleratorResource:
    ray = RayCluster(
        address=os.environ.get("RAY_ADDRESS", DEFAULT_ADDRESS),
        num_cpus=number("MLLM_ASSETS_RAY_NUM_CPUS", 1.0, least=0.0, kind=float),
        num_gpus=number("MLLM_ASSETS_RAY_NUM_GPUS", 0.0, least=0.0, kind=float),
        num_workers=number("MLLM_ASSETS_RAY_NUM_WORKERS", 1, least=1, kind=int),
        num_train_workers=number("MLLM_ASSETS_RAY_NUM_TRAIN_WORKERS", 1, least=1, kind=int),
        jobs_dir=str(layout.ray_jobs),
    )
    return RayAcceleratorResource(**_here().model_dump(), ray=ray)
