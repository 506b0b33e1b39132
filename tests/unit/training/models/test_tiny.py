"""The tiny Gemma 3: the same bytes every time, and a turn format like Gemma 3's."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllm_assets.training.models.tiny import build


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "gemma3_tiny"
    build(directory)
    return directory


def test_another_process_writes_the_same_bytes(built: Path, tmp_path: Path) -> None:
    """A tokenizer trainer with hash order in it would change the fingerprint, and with it every run's name."""
    code = "import sys, pathlib, mllm_assets.training.models.tiny as t; t.build(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, capture_output=True)
    names = sorted(path.name for path in built.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (built / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_complete_directory_is_left_alone(built: Path) -> None:
    before = (built / "model.safetensors").stat().st_mtime_ns
    assert build(built)["model"] == "gemma3_tiny"
    assert (built / "model.safetensors").stat().st_mtime_ns == before


def test_plain_transformers_loads_it_without_missing_or_unexpected_keys(built: Path) -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(built, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert 1_400_000 < sum(p.numel() for p in model.parameters()) < 2_000_000
    # a fresh projector is all zeros in transformers: the image would never reach the text
    assert model.model.multi_modal_projector.mm_input_projection_weight.abs().max() > 0


def test_turns_use_one_token_for_each_control_word(built: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(built).tokenizer
    ids = tokenizer.encode("<start_of_turn>user\n\n\n<start_of_image>hi<end_of_turn>\n", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids[:4]) == ["<start_of_turn>", "user", "\n\n\n", "<start_of_image>"]
    assert tokenizer.convert_ids_to_tokens(ids[-2:]) == ["<end_of_turn>", "\n"]
    assert type(tokenizer).__name__ == "GemmaTokenizer"
    assert tokenizer.decode(tokenizer.encode("Ünï 😀", add_special_tokens=False)) == "Ünï 😀"
