"""`image_do_pan_and_scan`: tokens, pixels and cached features are those of Gemma 3's own processor."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.errors import RecipeError
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.caches import tower
from mllm_assets.training.encoding.collate import Collator
from mllm_assets.training.encoding.encode import Encoder
from mllm_assets.training.encoding.image_files import load_image
from mllm_assets.training.models.device import Precision
from mllm_assets.training.models.load import load_model, load_processor
from tests import tiny_families
from tests.golden import fidelity_data

SHOWN = TurnSettings(image_do_pan_and_scan=True)
NUM_CROPS = [2, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0]  # of the wide, the tall and the large picture, and the small ones


@pytest.fixture(scope="module")
def processor(parity_dir: Path) -> Any:
    return load_processor(parity_dir / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("pictures")
    fidelity_data.write(folder)
    return Dataset(folder).entry("every_mode").rows


def test_ids_and_pixels_are_the_processors_own(processor: Any, rows: list[Row]) -> None:
    """What the published model is asked by any program that uses its processor."""
    text = "<bos><start_of_turn>user\n<start_of_image>What is shown?<end_of_turn>\n<start_of_turn>model\n"
    encoder, collator = Encoder(processor, SHOWN), Collator(processor, SHOWN)
    found = [encoder.encode_prompt(row) for row in rows]
    assert [row.num_crops for row in found] == NUM_CROPS
    for row in found[:4]:
        asked = {"text": [text], "images": [[load_image(row.images[0])]], "return_tensors": "pt"}
        own = processor(**asked, do_pan_and_scan=True, add_special_tokens=False)
        assert list(row.input_ids) == own["input_ids"][0].tolist()
        assert torch.equal(collator.tower_inputs([row])["pixel_values"], own["pixel_values"])


def test_cached_features_of_parts_are_those_of_a_step(parity_dir: Path, processor: Any, rows: list[Row]) -> None:
    """Features are kept by picture: those of its parts belong to it."""
    encoder, collator = Encoder(processor, SHOWN), Collator(processor, SHOWN, select_logits=False)
    encoded = [encoder.encode(rows[index]) for index in (3, 0, 1)]
    model = load_model(parity_dir / "model").eval()
    batch = {name: tensor for name, tensor in collator(encoded).items() if name != "labels"}
    assert "num_crops" not in batch
    kept = tower.image_rows(model, collator.tower_inputs(encoded), Precision(weights=torch.float32, autocast=None))
    with torch.no_grad():
        expected = model(**batch).logits
        tower.install(model)
        found = model(**{**batch, "pixel_values": torch.cat(kept)}).logits
    assert [len(rows_KW) for rows_KW in kept] == [4, 12, 16]
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_cache_without_parts_is_another(parity_dir: Path, processor: Any) -> None:
    model, names = load_model(parity_dir / "model"), set()
    for shown in (False, True):
        spec = TrainSpec(
            model_name_or_path="m", dataset="d", template="gemma3", do_train=True, image_do_pan_and_scan=shown
        )
        names.add(
            tower.tower_fingerprint(model, processor, spec, Precision(weights=torch.float32, autocast=None), "cpu")
        )
    assert len(names) == 2


def test_another_family_is_refused(tmp_path: Path) -> None:
    tiny_families.build("qwen3_vl", tmp_path)
    with pytest.raises(RecipeError, match="the model is Qwen3-VL. Delete the line"):
        Encoder(load_processor(tmp_path), SHOWN)
