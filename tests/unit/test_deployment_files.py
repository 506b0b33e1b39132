"""The files that Dagster reads, through Dagster's own loaders."""

import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import dagster as dg
import yaml
from dagster._core.workspace.load import location_origins_from_yaml_paths
from dagster_cloud_cli.config.models import load_dagster_cloud_yaml

ROOT = Path(__file__).parents[2]


def test_dagster_cloud_accepts_the_location() -> None:
    config = load_dagster_cloud_yaml((ROOT / "dagster_cloud.yaml").read_text())
    [location] = config.locations
    assert location.code_source.module_name == "mllm_assets.definitions"


def test_the_workspace_names_the_code_location() -> None:
    [origin] = location_origins_from_yaml_paths([str(ROOT / "workspace.yaml")])
    assert origin.location_name == "mllm_assets"


def test_the_instance_limits_pools_and_sends_no_telemetry() -> None:
    """A pool without a limit limits nothing."""
    settings = yaml.safe_load((ROOT / "dagster.yaml").read_text())
    assert settings["concurrency"]["pools"]["default_limit"] == 1
    assert settings["run_monitoring"] == {
        "enabled": True,
        "free_slots_after_run_end_seconds": 10,
        "max_resume_run_attempts": 0,
    }
    assert settings["telemetry"] == {"enabled": False}


def test_a_run_that_was_clicked_does_not_wait_for_the_queue() -> None:
    """Dagster looks at it every five seconds."""
    settings = yaml.safe_load((ROOT / "dagster.yaml").read_text())
    assert settings["run_queue"] == {"dequeue_interval_seconds": 1}
    with TemporaryDirectory() as home:
        shutil.copy(ROOT / "dagster.yaml", home)
        with dg.DagsterInstance.from_config(home) as instance:
            assert instance.get_concurrency_config().pool_config.default_pool_limit == 1, "both settings hold"
            assert getattr(instance.run_coordinator, "dequeue_interval_seconds", None) == 1


def test_the_yaml_examples_of_the_readme_are_valid() -> None:
    """A user pastes them, and a dataset file that is not YAML stops the code location."""
    blocks = (ROOT / "README.md").read_text().split("```yaml\n")[1:]
    examples = [yaml.safe_load(block.split("```")[0]) for block in blocks]
    assert [example["attributes"].get("name") for example in examples] == ["birds", None]


def test_the_readme_is_read_in_three_minutes() -> None:
    """It grew with every feature; details are on the pages of `docs/`."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_first_make_says_what_it_installs_and_how_long_it_takes() -> None:
    """Minutes of silence look like a hang."""
    done = subprocess.run(
        ["make", "-n", "-W", "pyproject.toml", "install"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    said, installed = done.stdout.index("under a minute"), done.stdout.index(".ci/install.py")
    assert said < installed
