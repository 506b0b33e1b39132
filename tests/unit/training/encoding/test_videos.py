"""Rows with videos become LLaMA-Factory's tokens and pixels, recorded by `tests.golden.record_videos`."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mllm_assets.data.sharegpt.rows import Message, Row
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.training.encoding.collate import Collator
from mllm_assets.training.encoding.encode import Encoder
from mllm_assets.training.models.load import load_processor
from tests import tiny_families
from tests.golden.record_videos import FOLDER, NUM_PIXELS, TEMPLATES

pytest.importorskip("av")
RECORDED = json.loads((FOLDER / "llamafactory.json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    Image.new("RGB", (80, 60), (40, 90, 200)).save(root / "a.png")
    for model_type in (*TEMPLATES, "llava"):
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
