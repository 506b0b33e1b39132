"""A trained model is published where its widths are those of real models: kernels differ from the demo's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm_assets.errors import IntegrityError
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.models import freezing, load, publishing
from mllm_assets.training.models.load import load_model, load_processor
from mllm_assets.training.models.publishing import publish_model
from tests import real_widths

PROJECTOR = {"finetuning_type": "full", "freeze_language_model": True, "freeze_multi_modal_projector": False}
TOP_LAYER = {"finetuning_type": "freeze", "freeze_trainable_layers": 1}
LORA = {"finetuning_type": "lora", "lora_rank": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_widths.build(tmp_path_factory.mktemp("real") / "source")


def trained(source: Path, **values: Any) -> Any:
    spec = TrainSpec(model_name_or_path="m", dataset="d", template="gemma3", do_train=True, bf16=True, **values)
    model = freezing.apply(spec, load_model(source, dtype=torch.bfloat16)).model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1e-3
    return model


def batch_of(source: Path) -> dict[str, torch.Tensor]:
    config = load.load_config(source)
    ids = torch.full((2, 40), 20)
    ids[:, 3 : 3 + real_widths.NUM_IMAGE_TOKENS] = config.image_token_id
    pixels = torch.rand(2, 3, real_widths.IMAGE_SIZE_PX, real_widths.IMAGE_SIZE_PX) * 2 - 1
    types = (ids == config.image_token_id).long()
    attention = torch.ones_like(ids)
    return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": types, "attention_mask": attention,
            "labels": ids}  # fmt: skip


@pytest.mark.parametrize("values", [PROJECTOR, LORA], ids=["projector", "lora"])
def test_a_bf16_model_of_real_widths_is_published(source: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    """The saved model's weights were frozen and the reloaded one's not, so that a matmul took another kernel."""
    model = trained(source, **values)
    reload = publish_model(model, load_processor(source), tmp_path, source, batch_of(source))
    assert reload["loss_saved"] == pytest.approx(reload["loss_reloaded"], rel=1e-6)
    moved, before = load_model(tmp_path / "model"), load_model(source)
    same = [torch.equal(a, b) for a, b in zip(moved.parameters(), before.parameters(), strict=True)]
    assert not all(same) and any(same)


def test_one_bit_that_the_loss_does_not_show_is_found(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tolerance is of the loss, not of the weights."""
    save = publishing.save_model

    def save_with_a_flipped_bit(model: Any, *args: Any, **options: Any) -> dict[str, str]:
        linked = save(model, *args, **options)
        [path] = args[1].glob("*.safetensors")
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith("fc1.bias"))
        tensors[name].view(torch.int16)[7] ^= 1
        save_file(tensors, path, metadata={"format": "pt"})
        return linked

    monkeypatch.setattr(publishing, "save_model", save_with_a_flipped_bit)
    with pytest.raises(IntegrityError, match=r"^1 of \d+ tensors have other bits after reloading .*fc1\.bias\. Run"):
        publish_model(trained(source, **PROJECTOR), load_processor(source), tmp_path, source, batch_of(source))
