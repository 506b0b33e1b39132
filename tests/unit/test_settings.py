"""A mistyped setting is named by its variable, wherever it is met; an empty one is none."""

from pathlib import Path

import pytest

from mllm_assets.cli import main
from mllm_assets.components.instance.doctor import check_dagster
from mllm_assets.components.reporting import load_project
from mllm_assets.defs.resources import resources
from mllm_assets.errors import MachineError
from mllm_assets.layout import Layout
from mllm_assets.operations.machine import check_device
from mllm_assets.settings import choice, number

REPOSITORY = Path(__file__).parents[2]


def test_a_setting_that_is_empty_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SETTING", "")
    assert number("A_SETTING", 2, least=0, kind=int) == 2
    assert choice("A_SETTING", ("local", "ray")) == "local"


@pytest.mark.parametrize("text", ["many", "-1", "1.5"])
def test_a_number_that_is_none_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SETTING", text)
    with pytest.raises(MachineError, match=f"A_SETTING is '{text}': expected a whole number of at least 0. Correct"):
        number("A_SETTING", 2, least=0, kind=int)


@pytest.mark.parametrize("text", ["nan", "inf", "x"])
def test_what_no_machine_has_is_no_number_of_its_cores(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SETTING", text)
    with pytest.raises(MachineError, match=f"A_SETTING is '{text}': expected a number of at least 0.0"):
        number("A_SETTING", 1.0, least=0.0, kind=float)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("MLLM_ASSETS_MAX_RETRIES", "expected a whole number of at least 0"),
        ("MLLM_ASSETS_LAUNCHER", "expected one of local, ray"),
        ("MLLM_ASSETS_DEVICE", "expected one of auto, cuda, mps, cpu"),
    ],
)
def test_the_project_and_doctor_say_which_setting_is_wrong(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first was a ValueError below Dagster's traceback, the other a sentence without its end."""
    monkeypatch.setenv(name, "foo")
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    with pytest.raises(MachineError, match=f"{name} is 'foo': {expected}"):
        load_project(REPOSITORY)
    [definitions, *_], _ = check_dagster(REPOSITORY, Layout(tmp_path))
    assert definitions.status == "fail" and f"{name} is 'foo'" in definitions.detail


def test_only_the_launcher_ray_shows_its_settings_in_the_launchpad(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {}
    for launcher in ("local", "ray"):
        monkeypatch.setenv("MLLM_ASSETS_LAUNCHER", launcher)
        gpu = (resources().resources or {})["gpu"]
        fields[launcher] = set(gpu.config_schema.as_field().config_type.fields)
    assert fields["ray"] - fields["local"] == {"ray"} and "device" in fields["local"]


def test_a_device_that_is_none_is_one_line_of_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended the command, which is there for such cases."""
    monkeypatch.setenv("MLLM_ASSETS_DEVICE", "gpu0")
    finding = check_device()
    assert (finding.status, finding.next_step) == ("fail", "Correct or unset it.")


def test_outside_a_project_nothing_is_told_to_start_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that was told made the whole line in whatever folder it was typed in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLLM_ASSETS_ROOT", raising=False)
    assert main(["summary", "emoji_sft"]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} is not a project" in error and "MLLM_ASSETS_ROOT" in error and "mllm-assets run" not in error
