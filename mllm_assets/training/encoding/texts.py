"""Token ids of texts, in which a run of image tokens costs as much as one, and a text that comes again nothing."""

import re
from array import array
from functools import lru_cache
from typing import Any

NUM_KEPT = 512  # texts whose ids are kept: questions recur, answers mostly do not
MAX_KEPT_CHARS = 8000  # of one of them, with a picture's tokens: about 4 MB together


class TextTokenizer:
    """Tokenises without special tokens of its own.

    A picture is hundreds of times the same token. Tokenizers split a text at such a token before they read the rest, so
    that the ids around a run do not depend on how long it is; one that behaves otherwise reads each text as it is.

    Args:
        tokenizer: The model's.
        image_token: What is repeated; one token.
    """

    def __init__(self, tokenizer: Any, image_token: str) -> None:
        self._tokenizer, self._image_token = tokenizer, image_token
        self._run = re.compile(f"(?:{re.escape(image_token)})+")
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self._kept_ids = lru_cache(NUM_KEPT)(self._ids)
        self._image_id = tokenizer.convert_tokens_to_ids(image_token)
        probe = f"a {image_token * 3}\n{image_token}b"
        self._shortens_runs = self._with_runs(probe).tolist() == tokenizer.encode(probe, add_special_tokens=False)

    def ids(self, text: str) -> "array[int]":
        """The ids of a text, in an array of the caller's own."""
        return self._kept_ids(text)[:] if len(text) <= MAX_KEPT_CHARS else self._ids(text)

    def _ids(self, text: str) -> "array[int]":
        is_run = self._shortens_runs and self._image_token in text
        return self._with_runs(text) if is_run else self._read(text)

    def _with_runs(self, text: str) -> "array[int]":
        lengths: list[int] = []

        def one(run: re.Match[str]) -> str:
            lengths.append(len(run.group()) // len(self._image_token))
            return self._image_token

        short = self._read(self._run.sub(one, text))
        if short.count(self._image_id) != len(lengths):
            return self._read(text)
        ids, begin, image = array("i"), 0, array("i", [self._image_id])
        for length in lengths:
            end = short.index(self._image_id, begin)
            ids += short[begin:end]
            ids += image * length
            begin = end + 1
        ids += short[begin:]
        return ids

    def _read(self, text: str) -> "array[int]":
        if not text:
            return array("i")
        # The library's `encode` makes masks and offsets around these ids, for twice their time
        backend = self._backend
        if backend is not None and backend.truncation is None and backend.padding is None:
            return array("i", backend.encode(text, add_special_tokens=False).ids)
        return array("i", self._tokenizer.encode(text, add_special_tokens=False))
