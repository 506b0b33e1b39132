"""What a run publishes of a model in several files: those that did not train are its base's, and cost no space."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.models import freezing
from mllm_assets.training.models.load import load_model, load_processor, publish_model
from tests.google_layout import FIRST, INDEX, SECOND, in_google_layout, tensors_of

PROJECTOR = {"finetuning_type": "full", "freeze_language_model": True, "freeze_multi_modal_projector": False}
pytestmark = pytest.mark.not_fast
NUM_BYTES_OF_TEXTS = 200_000  # tokenizer, configuration, index


@pytest.fixture(scope="module")
def base(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_google_layout(parity_dir / "model", tmp_path_factory.mktemp("base") / "model")


def publish(base: Path, run_dir: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Publish a model whose projector moved, and return what it had in memory, by the names in its files."""
    run_dir.mkdir(exist_ok=True)
    spec = TrainSpec(model_name_or_path="m", dataset="d", template="gemma3", do_train=True, **PROJECTOR)
    shape = freezing.apply(spec, load_model(base, dtype=dtype))
    with torch.no_grad():
        for parameter in shape.model.parameters():
            if parameter.requires_grad:
                parameter += 1e-3
    ids = torch.full((1, 12), 20)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    publish_model(shape.model, load_processor(base), run_dir, base, batch, trained=shape.names)
    return tensors_of(run_dir / "model")


def num_written() -> int:
    """Bytes that this process has handed to write calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar:"))


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="counts by Linux's /proc")
def test_a_file_in_which_nothing_trained_is_linked_and_not_written(base: Path, tmp_path: Path) -> None:
    """A projector of 12 MB wrote 8.6 GB of gemma-3-4b once more."""
    before, originals = num_written(), tensors_of(base)
    published = publish(base, tmp_path)
    assert num_written() - before < (base / FIRST).stat().st_size + NUM_BYTES_OF_TEXTS
    assert (tmp_path / "model" / SECOND).samefile(base / SECOND)
    assert (tmp_path / "model" / INDEX).read_bytes() == (base / INDEX).read_bytes()
    moved = {name for name in originals if not torch.equal(published[name], originals[name])}
    assert published.keys() == originals.keys() and moved and all("projector" in name for name in moved)
    # what is published again has taken the place of the name, not of the base's bytes
    untouched = (base / SECOND).read_bytes()
    publish(base, tmp_path)
    shutil.rmtree(tmp_path / "model")
    assert (base / SECOND).read_bytes() == untouched


def test_where_nothing_can_be_linked_the_same_bytes_are_copied(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    publish(base, tmp_path)
    copied = tmp_path / "model" / SECOND
    assert copied.read_bytes() == (base / SECOND).read_bytes() and not copied.samefile(base / SECOND)


def test_a_base_whose_tensors_are_cast_is_written_whole(base: Path, tmp_path: Path) -> None:
    """Its files hold other bits than what was trained on."""
    config = (base / "config.json").read_text()
    other = tmp_path / "bf16"
    shutil.copytree(base, other)
    (other / "config.json").write_text(config.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    published = publish(other, tmp_path / "run", torch.bfloat16)
    assert {tensor.dtype for tensor in published.values()} == {torch.bfloat16}
    assert not (tmp_path / "run" / "model" / INDEX).exists()
