"""The example for Kubernetes, through the configuration schema of dagster-k8s itself. No cluster has run it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("dagster_k8s")

from dagster._config import process_config
from dagster_k8s import K8sRunLauncher
from dagster_k8s.job import UserDefinedDagsterK8sConfig

pytestmark = pytest.mark.slow  # an extra of its own
VALUES = Path(__file__).parents[2] / "deploy" / "k8s" / "values.yaml"


def snake(values: dict[str, Any]) -> dict[str, Any]:
    """The chart's keys as it writes them into the instance's dagster.yaml."""
    return {re.sub(r"([A-Z])", lambda letter: f"_{letter[0].lower()}", key): value for key, value in values.items()}


def run_k8s_config() -> dict[str, Any]:
    launcher = yaml.safe_load(VALUES.read_text())["runLauncher"]["config"]["k8sRunLauncher"]
    assert list(launcher) == ["runK8sConfig"]
    return snake(launcher["runK8sConfig"])


def test_the_run_launcher_accepts_the_configuration() -> None:
    config = {
        "service_account_name": "dagster",
        "instance_config_map": "dagster-instance",
        "run_k8s_config": run_k8s_config(),
    }
    result = process_config(K8sRunLauncher.config_type(), config)
    assert result.success, result.errors
    config["run_k8s_config"] = {"pod_config": {}}
    assert not process_config(K8sRunLauncher.config_type(), config).success, "a mistyped part passes"


def test_kubernetes_knows_every_field_and_a_run_has_a_gpu() -> None:
    """`from_dict` reads each part with the model of the Kubernetes client, which refuses unknown fields."""
    parsed = UserDefinedDagsterK8sConfig.from_dict(run_k8s_config())
    assert parsed.container_config["resources"]["limits"]["nvidia.com/gpu"] == 1
    [toleration] = parsed.pod_spec_config["tolerations"]
    assert toleration["key"] == "nvidia.com/gpu"
