"""Texts that are tokenised once, and pictures that cost one token, give the tokenizer's own ids."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mllm_assets.training.encoding.texts import MAX_KEPT_CHARS, TextTokenizer

GEMMA = Path(__file__).parents[3] / "golden" / "parity" / "model"
IMAGE = "<image_soft_token>"
tokenizer = AutoTokenizer.from_pretrained(GEMMA)


class Counting:
    """The tokenizer, with a list of what it was asked to read."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.is_fast = False

    def __getattr__(self, name: str) -> Any:
        return getattr(tokenizer, name)

    def encode(self, text: str, **how: Any) -> list[int]:
        self.asked.append(text)
        return tokenizer.encode(text, **how)


pieces = st.sampled_from([IMAGE, IMAGE * 5, "\n", "\n\n", " ", "cat", "<start_of_image>", "<end_of_turn>\n", "é", "🙂"])


@given(st.lists(pieces, max_size=12).map("".join))
@settings(deadline=None)
def test_ids_are_the_tokenizers_own(text: str) -> None:
    texts = TextTokenizer(tokenizer, IMAGE)
    for _ in range(2):
        assert list(texts.ids(text)) == tokenizer.encode(text, add_special_tokens=False)


def test_a_question_that_comes_again_is_not_read_again_and_a_picture_is_read_as_one_token() -> None:
    counting = Counting()
    texts = TextTokenizer(counting, IMAGE)
    counting.asked.clear()
    questions = [f"<start_of_image>{IMAGE * 256}<end_of_image>What is it?", "What is it?"]
    first = [texts.ids(question) for question in questions]
    first[0].append(7)  # the array is the caller's own
    assert [texts.ids(question) for question in questions] == [first[0][:-1], first[1]]
    assert counting.asked == [f"<start_of_image>{IMAGE}<end_of_image>What is it?", "What is it?"]


def test_a_text_too_long_to_be_kept_is_read_each_time() -> None:
    counting = Counting()
    texts = TextTokenizer(counting, IMAGE)
    counting.asked.clear()
    long = "cat " * MAX_KEPT_CHARS
    assert list(texts.ids(long)) == list(texts.ids(long)) == tokenizer.encode(long, add_special_tokens=False)
    assert counting.asked == [long, long]


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_a_length_that_another_call_has_set_on_the_tokenizer_cuts_and_pads_nothing(setting: str) -> None:
    own = AutoTokenizer.from_pretrained(GEMMA)
    texts = TextTokenizer(own, IMAGE)
    own(
        "cat " * 50, max_length=8, **{"truncation": {"truncation": True}, "padding": {"padding": "max_length"}}[setting]
    )
    for text in ("a cat sits on the old chair near blue water", "a"):
        assert list(texts.ids(text)) == tokenizer.encode(text, add_special_tokens=False)


def test_a_tokenizer_that_reads_a_run_as_something_else_reads_each_text_whole() -> None:
    class Joining(Counting):
        def encode(self, text: str, **how: Any) -> list[int]:
            return super().encode(text.replace(IMAGE * 2, "x"), **how)

    joining = Joining()
    texts = TextTokenizer(joining, IMAGE)
    assert list(texts.ids(IMAGE * 4)) == joining.encode(IMAGE * 4, add_special_tokens=False)
