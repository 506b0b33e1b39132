r"""A row's conversation becomes the token ids of its turns, question and answer tokenised apart.

For Gemma 3: `<bos>` once, then for each turn `<start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n` and the
answer with its `<end_of_turn>\n`; a system text stands before the first user text with a blank line; `<image>` becomes
the processor's full image sequence; nothing is trimmed. Other families differ as `templates.py` and `image_slots.py`
say. Source: llamafactory 0.9.5, `data/template.py`.
"""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mllm_assets.data.tokens import IMAGE_PLACEHOLDER
from mllm_assets.errors import DataError
from mllm_assets.training.templates import Template, fill

if TYPE_CHECKING:
    from mllm_assets.data.sharegpt import Message, Row

Turn = tuple[list[int], list[int]]  # token ids of a question and of its answer


class TurnTokenizer:
    """Tokenises conversations in one turn format.

    Attributes:
        system: System text for rows that have none of their own.
        control_token: Matches the tokens that no text may hold.
    """

    def __init__(self, tokenizer: Any, template: Template, *, system: str | None, enable_thinking: bool | None) -> None:
        self.system = system
        self.control_token = control_token_pattern(tokenizer)
        self._tokenizer = tokenizer
        self._template = template
        self._enable_thinking = enable_thinking

    def tokenize(self, row: "Row", image_texts: Sequence[str], *, for_last_answer: bool = False) -> list[Turn]:
        """Return each turn's token ids; the answer of a row that ends with a question is empty.

        Args:
            row: The conversation.
            image_texts: What stands in the place of each image's placeholder.
            for_last_answer: Reasoning is taken out of all earlier answers.

        Raises:
            DataError: A text holds control tokens. Names the row.
        """
        messages: Sequence[Message] = row.messages
        system = self.system
        if messages and messages[0].role == "system":
            system, messages = messages[0].content, messages[1:]
        if system:
            self._refuse_control_tokens(row, "the system text", system)
        images = iter(image_texts)
        turns = []
        opening, joined = self._opening(system or self._template.default_system)
        for index in range(0, len(messages), 2):
            question = messages[index].content
            for part in question.split(IMAGE_PLACEHOLDER):
                self._refuse_control_tokens(row, f"message {index}", part)
            source = opening + self._tokens(fill(self._user_slot(question), joined + _expanded(question, images)))
            opening, joined = [], ""
            if index + 1 == len(messages):
                turns.append((source, []))
                break
            is_history = for_last_answer and index + 2 < len(messages)
            answer = messages[index + 1].content
            if self._enable_thinking is False or is_history:
                answer = self._template.without_thought(answer)
            for part in self._template.without_thought(answer).split(IMAGE_PLACEHOLDER):
                self._refuse_control_tokens(row, f"message {index + 1}", part)
            before, target = self._answer(_expanded(answer, images), is_history=is_history)
            turns.append((source + before, target))
        return turns

    def _opening(self, system: str) -> tuple[list[int], str]:
        """Return what stands before the first question: token ids, and text that is tokenised together with it."""
        template, bos = self._template, self._tokenizer.bos_token_id
        ids = [bos] if template.starts_with_bos and bos is not None else []
        ids += self._tokens(template.prefix)
        text = fill(template.system, system) if system else ""
        return (ids, text) if template.system_in_user else (ids + self._tokens(text), "")

    def _user_slot(self, question: str) -> str:
        image_first = self._template.user_image_first
        return image_first if image_first and question.startswith(IMAGE_PLACEHOLDER) else self._template.user

    def _answer(self, answer: str, *, is_history: bool) -> Turn:
        """Return what an answer adds to its question, and its own token ids."""
        template = self._template
        target = self._tokens(fill(template.assistant, answer))
        if template.ends_with_eos and self._tokenizer.eos_token_id is not None:
            target.append(self._tokenizer.eos_token_id)
        if template.thought is None or is_history or not template.lacks_thought(answer):
            return [], target
        thought = self._tokens("".join(template.thought))
        return ([], thought + target) if self._enable_thinking else (thought, target)

    def _refuse_control_tokens(self, row: "Row", place: str, text: str) -> None:
        """A tokenizer takes `<end_of_turn>` in a text for the end of the turn, and so does LLaMA-Factory.

        Encoding it as plain characters instead would train what no chat program sends, and other ids than
        LLaMA-Factory's from the same file.
        """
        if found := self.control_token.search(text):
            raise DataError(
                f"Row {row.id}: {place} holds {found.group()!r}, which steers the model and would be read as that, not "
                "as text. Take it out, or drop the row."
            )

    def _tokens(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []


def control_token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """What matches each special token of a tokenizer, and nothing where it has none."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(special, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # `(?!)` never matches


def _expanded(text: str, images: Iterator[str]) -> str:
    """Put what stands for the images in the place of their placeholders, in order."""
    first, *rest = text.split(IMAGE_PLACEHOLDER)
    return first + "".join(next(images) + part for part in rest)
