"""What is published is read by transformers 4.57 too, from PyPI and in front of this environment's own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm_assets.families.family import FAMILIES
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.training.encoding.collate import Collator, Padding
from mllm_assets.training.encoding.encode import Encoder
from mllm_assets.training.models import tiny
from mllm_assets.training.models.load import load_config, load_model, load_processor
from mllm_assets.training.models.publishing import save_model
from tests import older_transformers, tiny_families
from tests.google_layout import google_names
from tests.unit.training.encoding.test_encode_families import make_row, write_images

pytestmark = [pytest.mark.integration, pytest.mark.slow]
INSTALL = Path(__file__).parents[2] / ".ci" / "install.py"
OLDER = ("transformers==4.57.*", "tokenizers>=0.22,<0.23.1", "huggingface-hub>=0.34,<1")
IN_BOTH = ["gemma3", *(name for name in tiny_families.FAMILIES if FAMILIES[name].in_transformers_4)]
POSITIONS = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 12345.0},
}


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers 4.57 and the two libraries of which it needs other versions than are installed."""
    folder = tmp_path_factory.mktemp("older")
    command = [sys.executable, str(INSTALL), "--no-deps", "--target", str(folder), *OLDER]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        assert "there is no version of" not in done.stderr, done.stderr
        pytest.skip(f"transformers 4.57 cannot be installed: {done.stderr.strip()[-300:]}")
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family: a model as a run publishes it, named as real ones are, and a batch with pictures."""
    root = tmp_path_factory.mktemp("published")
    pictures, sources = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("sources")
    write_images(pictures)
    for model_type in IN_BOTH:
        source, folder = sources / model_type, root / model_type
        (folder / "model").mkdir(parents=True)
        if model_type == "gemma3":
            tiny.build(source)
            positions_of_gemma_3_4b(source)
        else:
            tiny_families.build(model_type, source)
        weights = source / "model.safetensors"
        save_file(google_names(load_file(weights)), weights, {"format": "pt"})
        processor = load_processor(source)
        save_model(load_model(source), processor, folder / "model", source=source)
        turns = TurnSettings(template=next(iter(FAMILIES[model_type].templates)))
        batch = Collator(processor, turns, padding=Padding(multiple_of=1), select_logits=False)(
            [Encoder(processor, turns).encode_prompt(make_row(pictures, 0))]
        )
        torch.save({name: value for name, value in batch.items() if name != "labels"}, folder / "batch.pt")
    return root


def positions_of_gemma_3_4b(source: Path) -> None:
    """Global positions are scaled by 8, and one layer is global."""
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["layer_types"][-1] = "full_attention"
    config["text_config"]["rope_parameters"] = POSITIONS
    (source / "config.json").write_text(json.dumps(config))


def test_transformers_4_57_computes_from_what_is_published_what_5_does(older: Path, published: Path) -> None:
    """Its Gemma 3 had other positions, without a word, and none of the tokenizers was read."""
    command = [sys.executable, "-P", older_transformers.__file__, str(older), str(published)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].startswith("4.57.")
    assert set(found["answers"]) == set(IN_BOTH)
    for model_type, there in found["answers"].items():
        here = older_transformers.answers(published / model_type)
        assert there.pop("logits") == pytest.approx(here.pop("logits"), abs=2e-5), model_type
        assert there.pop("pixels") == pytest.approx(here.pop("pixels"), abs=1e-6), model_type
        assert there == here, model_type
        assert here["num_wrong_keys"] == 0


def test_transformers_5_reads_from_both_spellings_what_was_saved(published: Path) -> None:
    text = load_config(published / "gemma3" / "model").text_config
    assert text.rope_parameters == POSITIONS
    written = json.loads((published / "gemma3" / "model" / "config.json").read_text())["text_config"]
    assert (written["rope_scaling"], written["rope_theta"], written["rope_local_base_freq"]) == (
        {"rope_type": "linear", "factor": 8.0}, 1e6, 12345.0,
    )  # fmt: skip
