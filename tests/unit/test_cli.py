"""The command line, before it starts any work."""

import subprocess
import sys

import pytest

from mllm_assets.cli import _parser, main


def test_the_device_of_the_environment_counts_unless_an_option_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training silently took the CPU where MLLM_ASSETS_DEVICE asked for a GPU."""
    monkeypatch.setenv("MLLM_ASSETS_DEVICE", "cuda")
    monkeypatch.setenv("MLLM_ASSETS_NUM_PROCESSES", "2")
    arguments = _parser().parse_args(["train", "r.yaml"])
    assert (arguments.device, arguments.num_processes) == ("cuda", 2)
    assert _parser().parse_args(["train", "r.yaml", "--device", "cpu"]).device == "cpu"


def test_an_unknown_device_in_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLLM_ASSETS_DEVICE", "gpu")
    assert main(["train", "r.yaml"]) == 2
    assert "MLLM_ASSETS_DEVICE is 'gpu': expected one of auto, cuda, mps, cpu" in capsys.readouterr().err


def test_help_loads_neither_torch_nor_dagster() -> None:
    """Each command pays for its own imports only: torch and transformers take 15 seconds."""
    heavy = "torch transformers dagster datasets gradio fastapi".split()
    code = "import sys; from mllm_assets.cli import _parser; _parser().format_help(); "
    code += f"print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
