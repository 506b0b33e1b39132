r"""A row's conversation becomes the token ids of its turns, question and answer tokenised separately.

For Gemma 3: `<bos>` once, then for each turn `<start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n` and the
answer with its `<end_of_turn>\n`; a system text precedes the first user text with a blank line; `<image>` becomes
the processor's full image sequence; nothing is trimmed. Other families differ as `families/` defines.
Source: llamafactory 0.9.5, `data/template.py`.
"""

import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mllm_assets.data.sharegpt.conversation import FUNCTION, IMAGE_PLACEHOLDER, OBSERVATION, VIDEO_PLACEHOLDER
from mllm_assets.errors import DataError
from mllm_assets.families.tool_formats import tools_text
from mllm_assets.families.turn_format import Template, fill
from mllm_assets.recipe.vocabulary_keys import TOKENS_IN_TEXTS
from mllm_assets.training.encoding.texts import MAX_KEPT_CHARS, NUM_KEPT, TextTokenizer

if TYPE_CHECKING:
    from mllm_assets.data.sharegpt.rows import Message, Row

MEDIA = re.compile(f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}")
Turn = tuple["array[int]", "array[int]"]  # token ids of a question and of its answer
Lengths = tuple[int, int]  # tokens of a question and of its answer


class TurnTokenizer:
    """Tokenises conversations in one turn format.

    Attributes:
        system: System text for rows without one; None for the format's own.
        enable_thinking: What becomes of reasoning, as in `TurnSettings`.
        control_token: Matches the tokens that a text must not hold.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        *,
        image_token: str,
        system: str | None,
        enable_thinking: bool | None,
    ) -> None:
        self.system = system
        self.control_token = control_token_pattern(tokenizer)
        self._tokenizer = tokenizer
        self._tokens = TextTokenizer(tokenizer, image_token).ids
        self._template = template
        self.enable_thinking = enable_thinking
        self._openings: dict[tuple[str, str], tuple[array[int], str]] = {}
        self._questions: dict[tuple[str, ...], array[int]] = {}

    def tokenize(
        self, row: "Row", image_texts: Sequence[str], video_texts: Sequence[str] = (), *, for_last_answer: bool = False
    ) -> list[Turn]:
        """Return each turn's token ids; the answer of a row that ends with a question is empty.

        Args:
            row: The conversation.
            image_texts: What replaces each image's placeholder.
            video_texts: What replaces each video's.
            for_last_answer: Reasoning is taken out of all earlier answers, and no empty one is put into them.

        Raises:
            DataError: A text holds control tokens, or placeholders for other videos than there are. Names the row.
        """
        _require_places(row, len(video_texts))
        messages: Sequence[Message] = row.messages
        system = self.system or ""
        if messages and messages[0].role == "system":
            system, messages = messages[0].content or system, messages[1:]
        if system:
            self._refuse_control_tokens(row, "the system text", system)
        elif self.system is None:
            system = self._template.default_system
        shown = Shown(image_texts, video_texts)
        turns = []
        self._require_tool_format(row)
        opening, joined = self._opening(system, row)
        for index in range(0, len(messages), 2):
            source = opening + self._question(row, index, messages[index], joined, shown)
            opening, joined = array("i"), ""
            if index + 1 == len(messages):
                turns.append((source + self._empty_answer(), array("i")))
                break
            is_history = for_last_answer and index + 2 < len(messages)
            told = messages[index + 1]
            if self.enable_thinking is False or is_history:
                told = replace(told, content=self._template.without_thought(told.content))
            for part in MEDIA.split(self._template.without_thought(told.content)):
                self._refuse_control_tokens(row, f"message {index + 1}", part)
            target = self._answer(replace(told, content=shown.put_into(told.content)), f"Row {row.id}")
            thought = array("i") if is_history else self._missing_thought(told.content)
            # an empty thought is learnt only where reasoning is
            turns.append((source, thought + target) if self.enable_thinking else (source + thought, target))
        return turns

    def _require_tool_format(self, row: "Row") -> None:
        if self._template.tools is None and (row.tools or any(m.role in (FUNCTION, OBSERVATION) for m in row.messages)):
            raise DataError(
                f"Row {row.id} has tools, and LLaMA-Factory has no format of them for this model's turns. Train a "
                "model of another family on it, or drop the row."
            )

    def _opening(self, system: str, row: "Row") -> tuple["array[int]", str]:
        """Return what precedes the first question: token ids, and text that is tokenised together with it."""
        key = (system, row.tools)
        if key not in self._openings:
            template, bos = self._template, self._tokenizer.bos_token_id
            ids = array("i", [bos] if template.starts_with_bos and bos is not None else [])
            ids += self._tokens(template.prefix)
            tools = ""
            if row.tools and template.tools:
                self._refuse_control_tokens(row, "the text of its tools", row.tools)
                tools = tools_text(template.tools, row.tools, f"Row {row.id}")
            text = fill(template.system, system + tools) if system or row.tools else ""
            if len(self._openings) >= NUM_KEPT:
                self._openings.clear()
            self._openings[key] = (ids, text) if template.system_in_user else (ids + self._tokens(text), "")
        return self._openings[key]

    def _question(self, row: "Row", index: int, asked: "Message", joined: str, shown: "Shown") -> "array[int]":
        """Return a question's ids, with what is tokenised together with it; the same one is made once."""
        question = asked.content
        media = shown.next_of(question)
        key = (asked.role, joined, question, *media)
        if (known := self._questions.get(key)) is not None:
            return known
        for part in MEDIA.split(question):
            self._refuse_control_tokens(row, f"message {index}", part)
        ids = self._tokens(fill(self._user_slot(asked), joined + _filled(question, media)))
        if len(question) + len(joined) <= MAX_KEPT_CHARS and sum(map(len, media)) <= MAX_KEPT_CHARS * 4:
            if len(self._questions) >= NUM_KEPT:
                self._questions.clear()
            self._questions[key] = ids
        return ids

    def _user_slot(self, asked: "Message") -> str:
        template = self._template
        if asked.role == OBSERVATION:
            return template.observation or template.user
        image_first = template.user_image_first
        return image_first if image_first and asked.content.startswith(IMAGE_PLACEHOLDER) else template.user

    def _answer(self, told: "Message", where: str) -> "array[int]":
        """Return an answer's token ids, reasoning that it lacks aside."""
        template, content = self._template, told.content
        is_call = told.role == FUNCTION and template.tools is not None
        if is_call:
            content = template.written_call(content, where)
        target = self._tokens(fill((template.function if is_call else None) or template.assistant, content))
        has_eos = template.ends_with_eos and not (is_call and template.function)
        if has_eos and self._tokenizer.eos_token_id is not None:
            target.append(self._tokenizer.eos_token_id)
        return target

    def _missing_thought(self, answer: str) -> "array[int]":
        """The empty reasoning that an answer without any gets."""
        template = self._template
        return self._tokens("".join(template.thought or ())) if template.lacks_thought(answer) else array("i")

    def _empty_answer(self) -> "array[int]":
        """What a question is followed by where the model is to answer."""
        return array("i") if self.enable_thinking else self._missing_thought("")

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


def control_token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that matches each special token of a tokenizer; without any it never matches.

    Those that a recipe added are for texts, and are left out.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special -= {*tokenizer.init_kwargs.get(TOKENS_IN_TEXTS, ())}
    longest_first = sorted(special, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # `(?!)` never matches


class Shown:
    """What replaces the placeholders of a row's pictures and videos, each kind in its order."""

    def __init__(self, image_texts: Sequence[str], video_texts: Sequence[str]) -> None:
        self._texts = {IMAGE_PLACEHOLDER: iter(image_texts), VIDEO_PLACEHOLDER: iter(video_texts)}

    def next_of(self, text: str) -> list[str]:
        """The replacements of a text's placeholders, those of the texts before it having been taken."""
        return [next(self._texts[placeholder]) for placeholder in MEDIA.findall(text)]

    def put_into(self, text: str) -> str:
        return _filled(text, self.next_of(text))


def _filled(text: str, media: Sequence[str]) -> str:
    first, *rest = MEDIA.split(text)
    return first + "".join(shown + part for shown, part in zip(media, rest, strict=True))


def _require_places(row: "Row", num_videos: int) -> None:
    num_places = sum(message.content.count(VIDEO_PLACEHOLDER) for message in row.messages)
    if num_places != num_videos:
        who = f"Row {row.id}" if row.id else "The prompt"
        raise DataError(
            f"{who} has {num_places} {VIDEO_PLACEHOLDER} placeholders, and {num_videos} videos. Write one for each "
            "video of the row's `videos`, and none for others."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTurns:
    """The lengths of a row's turns, to find how short it may be cut."""

    lengths: Sequence[Lengths]
    needed: Sequence[Lengths]  # of each turn, up to and including the last token of an image
    num_leading: int = 0  # tokens before the first turn

    def fits(self, cutoff_len: int, *, last_first: bool) -> bool:
        """Whether a cut at `cutoff_len` leaves every image complete."""
        kept = kept_lengths(self.lengths, cutoff_len - self.num_leading, last_first=last_first)
        return all(k[0] >= n[0] and k[1] >= n[1] for k, n in zip(kept, self.needed, strict=True))


def kept_lengths(lengths: Sequence[Lengths], room: int, *, last_first: bool = False) -> list[Lengths]:
    """Return how many tokens of each turn stay in a row of `room` tokens.

    With `last_first`, as for `mask_history`, the last turn gets its tokens first.
    Source: llamafactory 0.9.5, `SupervisedDatasetProcessor._encode_data_example`.
    """
    kept = [(0, 0)] * len(lengths)
    for index in reversed(range(len(lengths))) if last_first else range(len(lengths)):
        if room <= 0:
            break
        kept[index] = shared_room(*lengths[index], room)
        room -= sum(kept[index])
    return kept


def smallest_cutoff_len(rows: Iterable[ImageTurns], above: int, *, last_first: bool) -> int:
    """Return the least `cutoff_len` above a given one at which no row loses part of an image.

    It has to be searched: with more room a question may lose tokens, once all of its answer fits.
    """
    rows = list(rows)
    candidate = above + 1
    while not all(row.fits(candidate, last_first=last_first) for row in rows):
        candidate += 1
    return candidate


def shared_room(source_len: int, target_len: int, room: int) -> Lengths:
    """How many tokens of a question and of its answer stay: the shorter is kept completely if possible.

    Source: llamafactory 0.9.5, `infer_seqlen`.
    """
    if target_len * 2 < room:
        max_target_len = room
    elif source_len * 2 < room:
        max_target_len = room - source_len
    else:
        max_target_len = int(room * (target_len / (source_len + target_len)))
    kept_target_len = min(max_target_len, target_len)
    return min(max(room - kept_target_len, 0), source_len), kept_target_len
