"""`mllm-assets inspect`: what is shown is what the model gets."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_assets import cli
from mllm_assets.training.encoding.collate import Collator
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.models.load import load_processor
from tests.golden import fidelity_data

RECIPE = """model_name_or_path: pretrains/m
dataset: conversations
template: gemma3
do_train: true
finetuning_type: freeze
lora_rank: 4
mask_history: true
output_dir: outputs/r
"""


@pytest.fixture
def root(tmp_path: Path, parity_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(parity_dir / "model", tmp_path / "pretrains" / "m")
    fidelity_data.write(tmp_path / "data")
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(tmp_path))
    return tmp_path


def inspect(root: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["inspect", str(root / "r.yaml"), "--device", "cpu", *arguments]) == 0
    return capsys.readouterr().out


def test_a_row_is_shown_with_images_supervision_what_trains_memory_and_notes(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = inspect(root, capsys, "--row", "3")
    assert "row 3 of 9: conversations[3]\n279 tokens, 40 supervised, 2 images\n" in out
    assert re.search(r"image 0: large_rgba.png 1000x1000 RGBA -> 56x56 .*large_rgba-0-0.png", out)
    assert out.count("[[") == 2  # the last answer, and the words "[[double brackets]]"
    assert "[[leaf cup ball ring key face hand heart<end_of_turn>\n]]" in out
    assert "<start_of_image><image_soft_token> x 4<end_of_image>" in out
    assert re.search(r"language_model.layers.2 to 3 +26 +74,304 +28.03%", out)
    assert "memory: about" in out
    assert "note: lora_rank has no effect: finetuning_type is freeze, not lora." in out
    assert "\033" not in out


def test_a_run_that_would_be_refused_is_told_with_what_would_fit(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory was compared with the device's total and nothing said of it: the run itself was refused."""
    with (root / "r.yaml").open("a") as recipe:
        recipe.write("per_device_train_batch_size: 1000000\n")
    out = inspect(root, capsys, "--row", "0")
    assert re.search(r"memory: about .*, [\d.]+ of [\d.]+ GiB free on ", out)
    told = r"note: this run would be refused: The run needs about .* With per_device_train_batch_size: \d+, "
    assert re.search(told + r"gradient_accumulation_steps: \d+ it would need .* and fit\.", out)


def test_the_picture_written_is_what_the_tower_gets(
    root: Path, parity_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(root, capsys, "--row", "0")
    (path,) = (root / "outputs" / "r" / "inspect").glob("*.png")
    source = root / "data" / "images" / f"{path.stem.removesuffix('-0-0')}.png"
    row = EncodedRow.of_picture(source, "r")
    pixels = Collator(load_processor(parity_dir / "model")).tower_inputs([row])["pixel_values"][0]
    shown = np.asarray(Image.open(path)).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(shown - pixels.numpy()).max() < 1 / 127


def test_a_row_that_is_not_there_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(root / "r.yaml"), "--row", "9"]) == 2
    assert "--row 9: the recipe has the training rows 0 to 8. Choose one of them." in capsys.readouterr().err


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colour_is_for_terminals_that_want_it(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_color: str,
    coloured: bool,
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert ("\033[1;32m" in inspect(root, capsys)) == coloured
