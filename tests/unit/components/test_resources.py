"""The resources as a deployment sets them, and what a run may say instead."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.snap.snap_to_yaml import default_values_from_type_snap

from mllm_assets.components.resources import AcceleratorResource, RayAcceleratorResource, RayCluster, as_set
from mllm_assets.worker.ray_jobs import is_spread
from mllm_assets.worker.tasks import BuildTask


def made_with(resource: dg.ConfigurableResource, config: dict[str, Any]) -> Any:
    seen: list[Any] = []

    @dg.asset
    def trained(gpu: AcceleratorResource) -> None:
        seen.append(gpu)

    run_config = {"resources": {"gpu": {"config": config}}} if config else {}
    assert dg.materialize([trained], resources={"gpu": as_set(resource)}, run_config=run_config).success
    return seen[0]


def test_a_run_takes_the_resource_as_it_is_set_but_for_what_its_configuration_says() -> None:
    here = AcceleratorResource(device="cpu", max_retries=5)
    assert made_with(here, {}).model_dump() == here.model_dump()
    other = made_with(here, {"max_retries": 0, "retry_delay_s": 0.1})
    assert (other.device, other.max_retries, other.retry_delay_s) == ("cpu", 0, 0.1)


def test_a_ray_cluster_is_kept_and_a_setting_that_is_not_valid_is_refused() -> None:
    there = RayAcceleratorResource(device="cpu", ray=RayCluster(num_cpus=2.0))
    made = made_with(there, {"max_retries": 1})
    assert isinstance(made, RayAcceleratorResource) and made.ray.num_cpus == 2.0 and made.max_retries == 1
    with pytest.raises(dg.DagsterInvalidConfigError):
        made_with(there, {"device": "abacus"})


def test_only_training_is_spread_over_a_cluster(tmp_path: Path) -> None:
    there = RayAcceleratorResource(num_processes=3, ray=RayCluster(num_train_workers=4))
    assert there.num_training_processes == 4, "by which the run is named"
    assert RayAcceleratorResource(num_processes=3).num_training_processes == 3
    alone = there.accelerator(BuildTask(directory=tmp_path))
    assert (alone.num_processes, is_spread(BuildTask(directory=tmp_path, accelerator=alone))) == (1, False)


def test_the_launchpad_opens_with_no_setting_of_a_resource() -> None:
    """Eight settings of the machine stood below the recipe's values, the project's folder among them."""

    @dg.asset
    def trained(gpu: AcceleratorResource) -> None: ...

    gpu = as_set(AcceleratorResource(device="cpu"))
    job = dg.Definitions([trained], jobs=[dg.define_asset_job("line")], resources={"gpu": gpu}).resolve_job_def("line")
    snapshot = job.get_job_snapshot()
    schema = snapshot.config_schema_snapshot
    listed = default_values_from_type_snap(schema.get_config_snap(snapshot.mode_def_snaps[0].root_config_key), schema)
    assert listed["resources"]["gpu"] == {"config": {}}
