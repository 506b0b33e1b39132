"""An answer on the chat page, while somebody reads it and when nobody does any more."""

import shutil
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("gradio")
from mllm_assets.data.sharegpt.dataset import Dataset  # noqa: E402
from mllm_assets.inference.answerer import Answer, Answerer  # noqa: E402
from mllm_assets.inference.chat_page import Samples, _earlier, ask_while_read  # noqa: E402
from mllm_assets.inference.generate import ask, prompt_row  # noqa: E402
from mllm_assets.recipe.asking import Sampling  # noqa: E402

MODEL = Path(__file__).parents[2] / "golden" / "parity" / "model"


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(MODEL)


def test_the_words_so_far_lead_to_the_answer(answerer: Answerer) -> None:
    row, sampling = prompt_row([], "What is this?"), Sampling(max_new_tokens=12)
    *words, answer = ask_while_read(answerer, row, sampling)
    assert isinstance(answer, Answer) and answer.text == ask(answerer, row, sampling).text
    assert all(isinstance(text, str) and answer.text.startswith(text.strip()) for text in words)


def test_an_answer_ends_when_its_page_is_closed(answerer: Answerer) -> None:
    """It was generated to its end, and the next question waited for that."""
    sampling = Sampling(max_new_tokens=8000, do_sample=True, temperature=20.0, seed=1)
    answering = ask_while_read(answerer, prompt_row([], "What is this?"), sampling)
    num_threads = threading.active_count()
    started = time.monotonic()
    while not next(answering):
        pass
    begun_s = time.monotonic() - started
    answering.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert threading.active_count() <= num_threads
    assert time.monotonic() - started < 10 * begun_s + 5, "it took as long as 8000 tokens do"


def test_the_image_belongs_to_the_first_question_of_a_conversation(answerer: Answerer) -> None:
    picture = MODEL.parent / "data" / "images" / "emoji_000.png"
    turns = [("What is this?", ["A face\n\n2 tokens in 0.10 s"])]
    row = prompt_row([picture], "Which colour?", earlier=_earlier(turns, 0, has_image=True))
    assert [message.content for message in row.messages] == ["<image>What is this?", "A face", "Which colour?"]
    assert ask(answerer, row, Sampling(max_new_tokens=2)).num_tokens <= 2


def test_samples_have_their_images_in_another_folder(tmp_path: Path) -> None:
    """An entry whose recipe names a `media_dir` could be trained on, and not be looked at."""
    shutil.copytree(MODEL.parent / "data", tmp_path / "data", ignore=shutil.ignore_patterns("images"))
    shutil.copytree(MODEL.parent / "data" / "images", tmp_path / "photos" / "images")
    samples = Samples.read(Dataset(tmp_path / "data", media_dir=tmp_path / "photos"), "gemma3_vlm_val")
    assert samples.rows[0].images[0].is_relative_to(tmp_path / "photos")
