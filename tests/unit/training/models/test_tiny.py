"""The tiny Gemma 3: the same bytes every time, and a turn format like Gemma 3's."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

from mllm_assets.training.models.sentencepiece_file import BYTE, CONTROL, NORMAL, UNKNOWN
from mllm_assets.training.models.tiny import PROMPTS, build


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


def test_the_sentencepiece_file_gives_the_tokenizers_ids(built: Path) -> None:
    """llama.cpp reads `tokenizer.model`; with scores in another order it would write other ids for the same prompt."""
    file = sentencepiece.ModelProto.FromString((built / "tokenizer.model").read_bytes())
    tokenizer = AutoProcessor.from_pretrained(built).tokenizer
    assert [piece.piece for piece in file.pieces] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = {piece.piece: piece.type for piece in file.pieces}
    assert (kinds["<unk>"], kinds["<end_of_turn>"], kinds["<0x0A>"], kinds["▁in"]) == (UNKNOWN, CONTROL, BYTE, NORMAL)
    assert (file.trainer_spec.model_type, file.trainer_spec.byte_fallback, file.trainer_spec.bos_id) == (2, True, 2)
    assert not file.normalizer_spec.add_dummy_prefix and not file.normalizer_spec.remove_extra_whitespaces
    for text in (*PROMPTS, "Ünï 😀", "a  red\n\nheart", *("\n" * count for count in range(1, 9))):
        assert merged_by_score(text, file) == tokenizer.encode(text, add_special_tokens=False), repr(text)


def merged_by_score(text: str, file: Any) -> list[int]:
    """What SentencePiece does: of all neighbours that are a piece together, the best becomes it, the leftmost first."""
    ids = {piece.piece: number for number, piece in enumerate(file.pieces)}
    parts = list(text.replace(" ", "▁"))
    while True:
        pairs = [(ids.get(left + right), at) for at, (left, right) in enumerate(zip(parts, parts[1:], strict=False))]
        found = [(-file.pieces[number].score, at) for number, at in pairs if number is not None]
        if not found:
            break
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        number for part in parts
        for number in ([ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])
    ]  # fmt: skip


def test_its_tensors_have_the_names_that_other_programs_read(built: Path) -> None:
    with safe_open(built / "model.safetensors", framework="pt") as file:
        tower = [name for name in file.keys() if name.startswith("vision_tower.")]
    assert tower and all(name.startswith("vision_tower.vision_model.") for name in tower)
