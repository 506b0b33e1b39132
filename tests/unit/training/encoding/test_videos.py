"""Rows with videos become LLaMA-Factory's tokens and pixels, recorded by `tests.golden.record_videos`."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mllm_assets.data.sharegpt.rows import Message, Row
from mllm_assets.errors import DataError
from mllm_assets.families.video_slots import in_words
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.training.encoding.collate import Collator
from mllm_assets.training.encoding.encode import Encoder, ImageCutError
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.models.load import load_processor
from tests import tiny_families
from tests.golden.record_videos import FOLDER, NUM_PIXELS, TEMPLATES

pytest.importorskip("av")
RECORDED = json.loads((FOLDER / "llamafactory.json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    Image.new("RGB", (80, 60), (40, 90, 200)).save(root / "a.png")
    for model_type in (*TEMPLATES, "qwen2_vl", "qwen3_vl_moe", "smolvlm", "llava"):
        (root / model_type).mkdir()
        tiny_families.build(model_type, root / model_type)
    return root


def _row(root: Path, written: dict, **changes) -> Row:
    messages = tuple(
        Message("assistant" if number % 2 else "user", text) for number, text in enumerate(written["turns"])
    )
    images = tuple(root / name for name in written.get("images", ()))
    videos = tuple(FOLDER / name for name in written["videos"])
    return Row("r", **({"messages": messages, "images": images, "videos": videos} | changes))


@pytest.mark.parametrize("model_type", TEMPLATES)
def test_tokens_and_pixels_of_videos_are_llamafactorys(models, model_type):
    template, rows = TEMPLATES[model_type]
    processor = load_processor(models / model_type)
    for number, (written, expected) in enumerate(zip(rows, RECORDED[template], strict=True)):
        settings = TurnSettings(template=template, cutoff_len=4096, **written.get("keys", {}))
        encoded = Encoder(processor, settings).encode(_row(models, written))
        assert encoded.input_ids.tolist() == expected["input_ids"], number
        assert encoded.labels.tolist() == expected["labels"], number
        batch = Collator(processor, settings)([encoded])
        assert batch["video_grid_thw"].tolist() == expected["video_grid_thw"], number
        if "second_per_grid_ts" in expected:
            assert batch["second_per_grid_ts"].tolist() == pytest.approx(expected["second_per_grid_ts"], abs=1e-6)
        pixels = batch["pixel_values_videos"].flatten()[:NUM_PIXELS]
        assert (pixels - torch.tensor(expected["pixels"])).abs().max() < 0.05, number


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl_moe"])
def test_families_of_the_same_turns_have_the_same_tokens(models, model_type):
    """Two families that have the turns of another one, which was recorded."""
    other = {"qwen2_vl": "qwen2_5_vl", "qwen3_vl_moe": "qwen3_vl"}[model_type]
    template, rows = TEMPLATES[other]
    settings = TurnSettings(template=template, cutoff_len=4096)
    encoded = Encoder(load_processor(models / model_type), settings).encode(_row(models, rows[0]))
    assert encoded.input_ids.tolist() == RECORDED[template][0]["input_ids"]


def test_rows_with_videos_are_stored_and_put_together_again(models):
    template, rows = TEMPLATES["qwen2_5_vl"]
    encoder = Encoder(load_processor(models / "qwen2_5_vl"), TurnSettings(template=template, cutoff_len=4096))
    written = [encoder.encode(_row(models, row)) for row in (rows[0], rows[5], rows[6])]
    stored = EncodedRows.of(written, encoder.image_token_id, models)
    assert [replace(row, input_ids=None, labels=None) for row in stored] == [
        replace(row, input_ids=None, labels=None) for row in written
    ]
    assert [row.input_ids for row in stored] == [row.input_ids for row in written]
    assert stored.counted("videos").tolist() == [1, 1, 2]
    assert [row.videos[0].name for row in stored.videos()] == ["small.mp4", "large.mp4"]


def test_a_cut_inside_a_video_is_refused_with_the_least_length_that_works(models):
    template, rows = TEMPLATES["qwen2_5_vl"]
    processor, row = load_processor(models / "qwen2_5_vl"), _row(models, rows[0])
    with pytest.raises(
        ImageCutError, match=r"leaves \d+ of 72 image and video tokens. Set cutoff_len: (\d+)"
    ) as raised:
        Encoder(processor, TurnSettings(template=template, cutoff_len=100)).encode(row)
    least = int(re.search(r"cutoff_len: (\d+)", str(raised.value))[1])
    assert Encoder(processor, TurnSettings(template=template, cutoff_len=least)).encode(row).num_tokens_cut
    with pytest.raises(ImageCutError):
        Encoder(processor, TurnSettings(template=template, cutoff_len=least - 1)).encode(row)


def test_a_family_without_videos_says_which_have_them(models):
    _, rows = TEMPLATES["qwen2_5_vl"]
    encoder = Encoder(load_processor(models / "llava"), TurnSettings(cutoff_len=4096))
    with pytest.raises(DataError, match=r"Row r has videos, and of LLaVA only pictures .* \(Qwen2.5-VL, .*Qwen3-VL"):
        encoder.encode(_row(models, rows[0]))


def test_a_placeholder_without_a_video_is_refused(models):
    """A question of a chat: the tokenizer would read the letters, and LLaMA-Factory fails."""
    encoder = Encoder(load_processor(models / "qwen2_5_vl"), TurnSettings())
    with pytest.raises(DataError, match="The prompt has 1 <video> placeholders, and 0 videos"):
        encoder.encode_prompt(Row("", (Message("user", "<video>What moves?"),), ()))


def test_a_damaged_video_is_refused_with_its_row(models, tmp_path):
    template, rows = TEMPLATES["qwen2_5_vl"]
    encoder = Encoder(load_processor(models / "qwen2_5_vl"), TurnSettings(template=template))
    (tmp_path / "cut.mp4").write_bytes((FOLDER / "small.mp4").read_bytes()[:900])
    with pytest.raises(DataError, match=r"The video .*cut.mp4 of row r cannot be used: .* Replace the file or drop"):
        encoder.encode(_row(models, rows[0], videos=(tmp_path / "cut.mp4",)))


def test_frames_of_smolvlm_are_parts_of_a_picture_behind_their_times(models):
    """The text is that of transformers' processor, which needs torchvision and num2words."""
    processor = load_processor(models / "smolvlm")
    settings = TurnSettings(cutoff_len=4096, video_fps=1.0)
    encoder = Encoder(processor, settings)
    row = _row(models, {"turns": ["<video>What moves?", "A square."], "videos": ["small.mp4"]})
    encoded = encoder.encode(row)
    frame = "<fake_token_around_image><global-img><image><image><image><image><fake_token_around_image>"
    assert processor.tokenizer.decode(encoded.input_ids.tolist()) == (
        "<|im_start|>User: You are provided the following series of three frames from a 0:00:03 [H:MM:SS] video.\n"
        f"\nFrame from 00:00:{frame}\nFrame from 00:01:{frame}\nFrame from 00:02:{frame}\n\nWhat moves?"
        "<end_of_utterance>\nAssistant: A square.<end_of_utterance>\n"
    )
    picture = encoder.encode(_row(models, {"turns": ["<image>?", "A."], "videos": [], "images": ["a.png"]}))
    batch = Collator(processor, settings)([picture, encoded])
    assert (
        batch["pixel_values"].shape[:2] == batch["pixel_attention_mask"].shape[:2] and len(batch["pixel_values"]) == 2
    )
    with pytest.raises(DataError, match="Row r has images and videos, and SmolVLM takes one kind a row"):
        encoder.encode(_row(models, {"turns": ["<image><video>?", "A."], "videos": ["small.mp4"], "images": ["a.png"]}))


@pytest.mark.parametrize(
    ("number", "words"),
    [(1, "one"), (20, "twenty"), (64, "sixty-four"), (100, "one hundred"), (128, "one hundred and twenty-eight")],
)
def test_numbers_of_frames_are_written_as_num2words_writes_them(number, words):
    assert in_words(number) == words
