"""The checkout of llama.cpp that makes GGUF, and how its converter's result is known to be one."""

from pathlib import Path

import pytest

from mllm_assets.errors import MachineError
from mllm_assets.evaluation.agreement import Agreement
from mllm_assets.releases.copies import CONVERTER, LLAMA_CPP, GgufSpec


def test_without_a_checkout_it_is_said_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LLAMA_CPP, raising=False)
    with pytest.raises(MachineError, match=r"neither LLAMA_CPP nor gguf\.llama_cpp names one\. Get it: git clone"):
        GgufSpec().converter(tmp_path)
    with pytest.raises(MachineError, match=rf"elsewhere has no {CONVERTER}"):
        GgufSpec(llama_cpp="elsewhere").converter(tmp_path)


def test_the_setting_wins_over_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / CONVERTER).touch()
    monkeypatch.setenv(LLAMA_CPP, str(tmp_path / "one"))
    assert GgufSpec().converter(tmp_path) == tmp_path / "one" / CONVERTER
    assert GgufSpec(llama_cpp="other").converter(tmp_path) == tmp_path / "other" / CONVERTER
    assert GgufSpec(llama_cpp="other", min_agreement=0.5).agreement == Agreement(min_agreement=0.5)
