"""Tokens that steer the model or the data loader, which no text of a sample may hold."""

import re

# Gemma 3's control tokens (tokenizer_config.json of google/gemma-3-4b-it) and LLaMA-Factory's media placeholders
# (src/llamafactory/extras/constants.py): in a text they would be read as control, not as text.
CONTROL_TOKENS = (
    "<bos>",
    "<eos>",
    "<pad>",
    "<unk>",
    "<mask>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<image>",
    "<video>",
    "<audio>",
)
IMAGE_PLACEHOLDER = "<image>"
_PATTERN = re.compile("|".join(re.escape(token) for token in CONTROL_TOKENS) + r"|<unused\d+>")


def find_control_token(text: str) -> str | None:
    """The first control token in a text, or None."""
    match = _PATTERN.search(text)
    return match.group() if match else None


# C0 and C1 but tab and line ends: they print nothing, and a terminal obeys some. Marks of direction are text.
_CONTROL_CHARACTER = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# what decoders leave where they could not read; half of a surrogate pair is no character at all
_UNDECODABLE = re.compile("[\ufffd\ud800-\udfff]")


def text_defect(text: str) -> str | None:
    """What keeps a text from being trained on: "control_token", "control_character", "undecodable", or None."""
    if find_control_token(text):
        return "control_token"
    if _CONTROL_CHARACTER.search(text):
        return "control_character"
    return "undecodable" if _UNDECODABLE.search(text) else None
