"""The tokenizer of the tiny Gemma 3, trained in code on the embedded dataset: the same merges every time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GemmaTokenizer

from mllm_assets import sample_data

VOCAB_SIZE = 768
SPECIAL_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)
# Gemma 3 has one token for each run of newlines; the turn format depends on "\n" and "\n\n\n".
NEWLINES = tuple("\n" * count for count in range(1, 6))
# Questions that the embedded dataset asks, and some that a person would
PROMPTS = (
    "What kind of emoji is this?",
    "Which group does this emoji belong to?",
    "Name the category of this emoji.",
    "What does this emoji show?",
    "Which kind of picture is this?",
    "Describe this picture.",
    "What is shown here?",
    "Name the emoji.",
)
# Gemma 3's own template (gemma-3-4b-it): bos once, the system text before the first user text, turns trimmed.
CHAT_TEMPLATE = """{{ bos_token }}
{%- set system = "" -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set text = messages[0]['content'] -%}
    {%- set system = (text if text is string else text[0]['text']) + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
    {{- system if loop.first else '' }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""


def build_tokenizer() -> Any:
    """Train a byte-fallback BPE on the embedded captions, class names and prompts."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split("▁", "merged_with_next")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[*SPECIAL_TOKENS, *NEWLINES, *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    for shorter, longer in zip(NEWLINES, NEWLINES[1:], strict=False):
        merges.append((shorter, longer[len(shorter) :]))
    return GemmaTokenizer(
        vocab=model["vocab"],
        merges=merges,  # pyright: ignore[reportArgumentType]
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=8192,
    )


def _corpus() -> Iterator[str]:
    table = pq.read_table(Path(sample_data.__file__).with_name("emoji.parquet"), columns=["text", "group"])
    features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
    names = features["group"]["names"]
    yield from table["text"].to_pylist()
    yield from [names[group] for group in table["group"].to_pylist()]
    yield from ["user", "model", *PROMPTS] * 20
