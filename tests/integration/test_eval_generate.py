"""One answer of a model."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from mllm_assets.errors import DataError, IntegrityError, MllmAssetsError, ModelError
from mllm_assets.inference.generate import generate
from mllm_assets.inference.naming import find_model

pytestmark = pytest.mark.integration
GOLDEN = Path(__file__).parents[1] / "golden" / "parity"
MODEL = GOLDEN / "model"
IMAGE = GOLDEN / "data" / "images" / "emoji_000.png"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_an_answer_comes_with_its_time_and_length() -> None:
    answer = generate(MODEL, [IMAGE], "Describe this picture.", max_new_tokens=5, device="cpu")
    assert answer.num_tokens <= 5 and answer.text and 0 < answer.time_s < 30


def test_greedy_answers_repeat_and_sampled_ones_repeat_with_their_seed() -> None:
    def ask(**options: object) -> str:
        return generate(MODEL, [IMAGE], "What?", max_new_tokens=8, device="cpu", **options).text  # type: ignore[arg-type]

    assert ask() == ask()
    assert ask(do_sample=True, temperature=2.0, seed=1) == ask(do_sample=True, temperature=2.0, seed=1)
    assert ask(do_sample=True, temperature=2.0, seed=1) != ask(do_sample=True, temperature=2.0, seed=2)


def test_placeholders_say_where_the_images_stand() -> None:
    before = generate(MODEL, [IMAGE], "What is this?", max_new_tokens=6, device="cpu")
    same = generate(MODEL, [IMAGE], "<image>What is this?", max_new_tokens=6, device="cpu")
    assert same.text == before.text
    two = generate(MODEL, [IMAGE, IMAGE], "<image>and<image>", max_new_tokens=2, device="cpu")
    assert two.num_tokens <= 2
    assert generate(MODEL, [], "No picture at all.", max_new_tokens=2, device="cpu").num_tokens <= 2


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
        generate(tmp_path / name, [IMAGE], "What?")


def test_wrong_images_are_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no.png does not exist. Check the path."):
        generate(tmp_path, [tmp_path / "no.png"], "What?")
    with pytest.raises(DataError, match="The prompt has 2 <image> placeholders for 1 images. Give one each"):
        generate(tmp_path, [IMAGE], "<image><image>What?")


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(IMAGE.read_bytes()[:200])
    with pytest.raises(DataError, match=r"The image .*/bad.png cannot be read \(.*\)\. Give another file\."):
        generate(MODEL, [tmp_path / "bad.png"], "What?", device="cpu")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(
        DataError, match=r"The image .*/text.png cannot be read \(UnidentifiedImageError: .*another file"
    ):
        generate(tmp_path, [tmp_path / "text.png"], "What?", device="cpu")


def test_an_image_too_large_to_decode_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")
    with pytest.raises(DataError, match="large.png has 10000 x 9000 pixels, at most 89,478,485 are decoded. Shrink"):
        generate(tmp_path, [tmp_path / "large.png"], "What?", device="cpu")
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(51 * 2**20)
    with pytest.raises(DataError, match="long.png has 51.0 MiB, at most 50 are read. Shrink it."):
        generate(tmp_path, [tmp_path / "long.png"], "What?", device="cpu")


@pytest.mark.parametrize(
    ("prompt", "system", "name"), [("a <end_of_turn>", None, "prompt"), ("a", "<bos>", "system text")]
)
def test_a_text_that_steers_the_model_is_named(prompt: str, system: str | None, name: str) -> None:
    with pytest.raises(DataError, match=rf"^The {name} holds '<\w+>', which steers the model.* Take it out\.$"):
        generate(MODEL, [], prompt, system=system, device="cpu")


def test_a_question_longer_than_the_context_is_refused_with_both_lengths() -> None:
    with pytest.raises(
        DataError, match=r"The prompt has [\d,]+ tokens, .* context holds 8,192 with the answer. Shorten"
    ):
        generate(MODEL, [IMAGE], "word " * 9000, device="cpu")


def test_sampling_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(MllmAssetsError, match="got 0.0 and 1.0. For the likeliest answer leave sampling off."):
        generate(MODEL, [IMAGE], "What?", do_sample=True, temperature=0.0)


def test_a_model_without_its_weights_is_named(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match="The weights in .*/m cannot be loaded"):
        generate(tmp_path / "m", [IMAGE], "What?", device="cpu")
