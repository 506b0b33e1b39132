r"""Turn formats under LLaMA-Factory's template names: what stands around system text, questions and answers.

Each string is tokenised apart, as LLaMA-Factory tokenises its slots. Source: llamafactory 0.9.5, `data/template.py`;
`smolvlm` is SmolVLM's own chat template, which LLaMA-Factory does not have.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """One turn format; `{content}` is where the text goes.

    Attributes:
        user: A question up to where the model answers.
        assistant: An answer, all of it supervised.
        user_image_first: In place of `user` for a question that begins with an image.
        system: The system text, before the first question.
        system_in_user: The system text is tokenised together with the first question.
        default_system: For rows that have none.
        prefix: Text before everything.
        starts_with_bos: The first token is the tokenizer's bos, where it has one.
        ends_with_eos: The tokenizer's eos follows each answer.
        stop: The token that ends an answer where it is not eos.
        thought: What opens and closes a model's reasoning; an answer without it gets an empty one.
        images_first: All image tokens stand before the first text, whatever the place of the placeholders.
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

    def lacks_thought(self, answer: str) -> bool:
        """Whether an answer holds no reasoning although the format has a place for it."""
        return self.thought is not None and not any(word.strip() in answer for word in self.thought)

    def without_thought(self, answer: str) -> str:
        """Take the reasoning out of an answer."""
        if self.thought is None:
            return answer
        opening, closing = map(re.escape, self.thought)
        return re.sub(f"{opening}(.*?){closing}", "", answer, flags=re.DOTALL).lstrip("\n")


def _gemma(*, system: str, images_first: bool = False) -> Template:
    return Template(
        user="<start_of_turn>user\n{content}<end_of_turn>\n<start_of_turn>model\n",
        assistant="{content}<end_of_turn>\n",
        system=system,
        system_in_user=True,
        starts_with_bos=True,
        stop="<end_of_turn>",
        images_first=images_first,
    )


def _gemma4() -> Template:
    return Template(
        user="<|turn>user\n{content}<turn|>\n<|turn>model\n",
        assistant="{content}<turn|>\n",
        system="<|turn>system\n<|think|>{content}<turn|>\n",
        default_system="You are a helpful assistant.",
        starts_with_bos=True,
        stop="<turn|>",
        thought=("<|channel>thought\n", "<channel|>"),
    )


def _qwen(*, default_system: str = "", thought: tuple[str, str] | None = None) -> Template:
    return Template(
        user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
        assistant="{content}<|im_end|>\n",
        system="<|im_start|>system\n{content}<|im_end|>\n",
        default_system=default_system,
        stop="<|im_end|>",
        thought=thought,
    )


TEMPLATES: dict[str, Template] = {
    "gemma3": _gemma(system="{content}\n\n"),
    "gemma4": _gemma4(),
    "gemma4n": _gemma4(),  # differs by audio only
    "qwen2_vl": _qwen(default_system="You are a helpful assistant."),
    "qwen3_vl": _qwen(thought=("<think>\n", "\n</think>\n\n")),
    "qwen3_vl_nothink": _qwen(),
    "llava": Template(
        user="USER: {content} ASSISTANT:",
        ends_with_eos=True,
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    "paligemma": Template(
        user="{content}\n", system_in_user=True, starts_with_bos=True, ends_with_eos=True, images_first=True
    ),
    "paligemma_chat": _gemma(system="{content}", images_first=True),
    "smolvlm": Template(
        prefix="<|im_start|>",
        user="User: {content}<end_of_utterance>\nAssistant:",
        user_image_first="User:{content}<end_of_utterance>\nAssistant:",
        assistant=" {content}<end_of_utterance>\n",
        system="System: {content}<end_of_utterance>\n",
        stop="<end_of_utterance>",
    ),
}


def fill(slot: str, content: str) -> str:
    """Put a text into a slot; what the text itself holds is left alone."""
    before, _, after = slot.partition("{content}")
    return before + content + after
