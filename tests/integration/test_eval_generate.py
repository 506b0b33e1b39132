"""One answer of a model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mllm_assets.errors import DataError, IntegrityError, MllmAssetsError, ModelError
from mllm_assets.inference.answerer import Answer
from mllm_assets.inference.generate import generate
from mllm_assets.recipe.asking import Sampling, TurnSettings
from mllm_assets.training.runs.models import NamedModel, find_model

pytestmark = pytest.mark.integration
GOLDEN = Path(__file__).parents[1] / "golden" / "parity"
MODEL = GOLDEN / "model"
IMAGE = GOLDEN / "data" / "images" / "emoji_000.png"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def ask(directory: Path, images: list[Path], prompt: str, system: str | None = None, **sampling: Any) -> Answer:
    model = NamedModel(name="asked", directory=directory, turns=TurnSettings(system=system))
    return generate(model, images, prompt, Sampling(**sampling), device="cpu")


def test_an_answer_comes_with_its_time_and_length() -> None:
    answer = ask(MODEL, [IMAGE], "Describe this picture.", max_new_tokens=5)
    assert answer.num_tokens <= 5 and answer.text and 0 < answer.latency_s < 30


def test_greedy_answers_repeat_and_sampled_ones_repeat_with_their_seed() -> None:
    def said(**options: Any) -> str:
        return ask(MODEL, [IMAGE], "What?", max_new_tokens=8, **options).text

    assert said() == said()
    assert said(do_sample=True, temperature=2.0, seed=1) == said(do_sample=True, temperature=2.0, seed=1)
    assert said(do_sample=True, temperature=2.0, seed=1) != said(do_sample=True, temperature=2.0, seed=2)


def test_placeholders_say_where_the_images_stand() -> None:
    before = ask(MODEL, [IMAGE], "What is this?", max_new_tokens=6)
    same = ask(MODEL, [IMAGE], "<image>What is this?", max_new_tokens=6)
    assert same.text == before.text
    two = ask(MODEL, [IMAGE, IMAGE], "<image>and<image>", max_new_tokens=2)
    assert two.num_tokens <= 2
    assert ask(MODEL, [], "No picture at all.", max_new_tokens=2).num_tokens <= 2


def test_a_run_directory_stands_for_its_model(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(MODEL)
    assert find_model(tmp_path) == tmp_path / "model"
    assert find_model(MODEL) == MODEL


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere does not exist. Give a model directory, for example outputs/<recipe>/latest/model."),
        ("empty", "neither config.json nor model/config.json. Give a Hugging Face model directory, a release or"),
        ("checkpoint-4", "checkpoint-4 was never finished: it has no manifest.json. Choose another one of"),
    ],
)
def test_what_is_no_model_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises((ModelError, IntegrityError), match=message):
        ask(find_model(tmp_path / name), [IMAGE], "What?")


def test_wrong_images_are_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no.png cannot be used: it does not exist. Give another file."):
        ask(tmp_path, [tmp_path / "no.png"], "What?")
    with pytest.raises(DataError, match="The prompt has 2 <image> placeholders for 1 images. Give one each"):
        ask(tmp_path, [IMAGE], "<image><image>What?")


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(IMAGE.read_bytes()[:200])
    with pytest.raises(
        DataError, match=r"The image .*/bad.png cannot be used: it is damaged \(.*\)\. Give another file\."
    ):
        ask(MODEL, [tmp_path / "bad.png"], "What?")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"The image .*/text.png cannot be used: it is not a picture .*another file"):
        ask(tmp_path, [tmp_path / "text.png"], "What?")


def test_an_image_too_large_to_decode_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")
    with pytest.raises(
        DataError, match="large.png cannot be used: it has 10000 x 9000 pixels, expected at most 89,478,485."
    ):
        ask(tmp_path, [tmp_path / "large.png"], "What?")
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(51 * 2**20)
    with pytest.raises(DataError, match="long.png cannot be used: it has 51.0 MiB, expected at most 50."):
        ask(tmp_path, [tmp_path / "long.png"], "What?")


@pytest.mark.parametrize(
    ("prompt", "system", "name"), [("a <end_of_turn>", None, "prompt"), ("a", "<bos>", "system text")]
)
def test_a_text_that_steers_the_model_is_named(prompt: str, system: str | None, name: str) -> None:
    with pytest.raises(DataError, match=rf"^The {name} holds '<\w+>', which steers the model.* Take it out\.$"):
        ask(MODEL, [], prompt, system=system)


def test_a_question_longer_than_the_context_is_refused_with_both_lengths() -> None:
    with pytest.raises(
        DataError, match=r"The prompt has [\d,]+ tokens, .* context holds 8,192 with the answer. Shorten"
    ):
        ask(MODEL, [IMAGE], "word " * 9000)


def test_sampling_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(MllmAssetsError, match="got 0.0 and 1.0. For the likeliest answer leave sampling off."):
        ask(MODEL, [IMAGE], "What?", do_sample=True, temperature=0.0)


def test_a_model_without_its_weights_is_named(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match="The weights in .*/m cannot be loaded"):
        ask(tmp_path / "m", [IMAGE], "What?")
