"""Tiny random models of families that this package does not describe: they train by their own files alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    AyaVisionConfig,
    AyaVisionProcessor,
    CLIPVisionConfig,
    CohereConfig,
    Idefics3Config,
    Idefics3Processor,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.tiny_families import TEXT, VISION

TILE = {"height": 32, "width": 32}
GRIDS = [[32, 64], [64, 32], [64, 64]]
CHAT_TEMPLATE = """{{ bos_token }}{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{{ '<image>' }}{%- else -%}{{ item['text'] }}{%- endif -%}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
Made = tuple[Any, Any]  # configuration and processor


def build(model_type: str, directory: Path) -> Path:
    """Write a complete model directory and return it."""
    config, processor = MODELS[model_type]()
    tokenizer = processor.tokenizer
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config.text_config, name, getattr(tokenizer, name))
    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def _tokenizer(*markers: str) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<|im_start|>", "<|im_end|>", "<image>", *markers]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(["What is in this picture? Describe it. A red heart, a blue car, a smiling face."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", "<image>", *markers], model_max_length=4096,
    )  # fmt: skip


def _idefics3() -> Made:
    rows = (f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    tokenizer = _tokenizer("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    config = Idefics3Config(
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer)},
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return config, Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT_TEMPLATE)


def _aya_vision() -> Made:
    markers = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"]
    tokenizer = _tokenizer(*markers)
    images = GotOcr2ImageProcessorPil(size=TILE, crop_to_patches=True, max_patches=4)
    config = AyaVisionConfig(
        text_config=CohereConfig(
            **{name: value for name, value in TEXT.items() if name != "head_dim"}, vocab_size=len(tokenizer)
        ),
        vision_config=SiglipVisionConfig(**VISION, image_size=32, patch_size=8, vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
        vision_feature_layer=-1,
    )
    processor = AyaVisionProcessor(
        images, tokenizer, patch_size=8, img_size=32, downsample_factor=2, chat_template=CHAT_TEMPLATE
    )
    return config, processor


def _llava_next() -> Made:
    tokenizer = _tokenizer()
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=TILE, image_grid_pinpoints=GRIDS)
    config = LlavaNextConfig(
        text_config=LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        vision_config=CLIPVisionConfig(**VISION, image_size=32, patch_size=8, projection_dim=16),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=GRIDS,
        vision_feature_layer=-1,
    )
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    return config, processor


MODELS: dict[str, Callable[[], Made]] = {"idefics3": _idefics3, "aya_vision": _aya_vision, "llava_next": _llava_next}
