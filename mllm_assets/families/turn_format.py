"""A turn format: what is written around the texts of a conversation, and the formats that several families share.

Formats are LLaMA-Factory's (0.9.5, `data/template.py`).
"""

import re
from dataclasses import dataclass
from typing import Literal

from mllm_assets.families.tool_formats import DEFAULT_REASONING, call_text

AUTO = "auto"  # turns as the model's own chat template writes them, for families that are not described here


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """A turn format: what surrounds system text, questions and answers; `{content}` is where the text goes.

    Each string is tokenised separately, as LLaMA-Factory tokenises its slots.

    Attributes:
        user: A question up to where the model answers.
        assistant: An answer, all of it supervised.
        user_image_first: Instead of `user` for a question that begins with an image.
        system: The system text, before the first question.
        system_in_user: The system text is tokenised together with the first question.
        default_system: For rows that have none.
        prefix: Text before everything.
        starts_with_bos: The first token is the tokenizer's bos, where it has one.
        ends_with_eos: The tokenizer's eos follows each answer.
        stop: The token that ends an answer where it is not eos.
        thought: What opens and closes a model's reasoning; an answer without reasoning gets an empty one.
        images_first: All image tokens come before the first text, wherever the placeholders are.
        tools: The `tool_formats.FORMATS` in which tools and calls are written; None refuses rows with tools.
        observation: What a tool gave back, up to where the model answers; None writes it as `user`.
        function: Instead of `assistant` for an answer that calls tools; eos does not follow it.
        in_llamafactory: Whether LLaMA-Factory has it, under the same name.
    """

    user: str
    assistant: str = "{content}"
    user_image_first: str | None = None
    system: str = "{content}"
    system_in_user: bool = False
    default_system: str = ""
    prefix: str = ""
    starts_with_bos: bool = False
    ends_with_eos: bool = False
    stop: str | None = None
    thought: tuple[str, str] | None = None
    images_first: bool = False
    tools: Literal["default", "qwen", "qwen3_5", "gemma4"] | None = None
    observation: str | None = None
    function: str | None = None
    in_llamafactory: bool = True

    def lacks_thought(self, answer: str) -> bool:
        """Whether an answer holds no reasoning although the format has a place for it."""
        return self.thought is not None and not any(word.strip() in answer for word in self.thought)

    def without_thought(self, answer: str) -> str:
        """Take the reasoning out of an answer."""
        if self.thought is None:
            return answer
        opening, closing = map(re.escape, self.thought)
        return re.sub(f"{opening}(.*?){closing}", "", answer, flags=re.DOTALL).lstrip("\n")

    def written_call(self, content: str, where: str) -> str:
        """What the model writes for a function message; formats with the system text in the question know no reasoning.

        Raises:
            DataError: It is no call; begins with `where`.
        """
        assert self.tools is not None, "rows with tools are refused"
        reasoning = None if self.system_in_user else self.thought or DEFAULT_REASONING
        return call_text(self.tools, content, where, reasoning=reasoning)


def gemma_turns(*, system: str, images_first: bool = False) -> Template:
    """Gemma's turns up to Gemma 3."""
    return Template(
        user="<start_of_turn>user\n{content}<end_of_turn>\n<start_of_turn>model\n",
        assistant="{content}<end_of_turn>\n",
        system=system,
        system_in_user=True,
        starts_with_bos=True,
        stop="<end_of_turn>",
        images_first=images_first,
        tools="default",
        observation="<start_of_turn>tool\n{content}<end_of_turn>\n<start_of_turn>model\n",
    )


def qwen_turns(
    *,
    default_system: str = "",
    thought: tuple[str, str] | None = None,
    tools: Literal["qwen", "qwen3_5"] = "qwen",
) -> Template:
    """Qwen's turns."""
    return Template(
        user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
        assistant="{content}<|im_end|>\n",
        system="<|im_start|>system\n{content}<|im_end|>\n",
        default_system=default_system,
        stop="<|im_end|>",
        thought=thought,
        tools=tools,
        observation="<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    )


QWEN_THOUGHT = ("<think>\n", "\n</think>\n\n")
QWEN2_TURNS = qwen_turns(default_system="You are a helpful assistant.")
INTERN_TURNS = Template(
    user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
    assistant="{content}<|im_end|>\n",
    system="<|im_start|>system\n{content}<|im_end|>\n",
    starts_with_bos=True,
    stop="<|im_end|>",
    tools="default",
)
GEMMA4_TURNS = Template(
    user="<|turn>user\n{content}<turn|>\n<|turn>model\n",
    assistant="{content}<turn|>\n",
    system="<|turn>system\n<|think|>{content}<turn|>\n",
    default_system="You are a helpful assistant.",
    starts_with_bos=True,
    stop="<turn|>",
    thought=("<|channel>thought\n", "<channel|>"),
    tools="gemma4",
    observation="<|turn>tool\n{content}<turn|>\n<|turn>model\n",
    function="<|tool>{content}<tool|>",
)


def fill(slot: str, content: str) -> str:
    """Put a text into a slot; a `{content}` in the text itself stays."""
    before, _, after = slot.partition("{content}")
    return before + content + after
