"""Tiny random models of families that this package does not describe: they train by their own files alone."""

import json
from collections.abc import Callable
from dataclasses import dataclass
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
    DeepseekVLConfig,
    DeepseekVLProcessor,
    Glm4vConfig,
    Idefics2Config,
    Idefics2Processor,
    Idefics3Config,
    Idefics3Processor,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    Ovis2Config,
    Ovis2Processor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

from tests.tiny_families import QWEN_TEXT, QWEN_VISION, TEXT, VISION

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


@dataclass(frozen=True, slots=True)
class WithoutVideos:
    """The files of a processor whose part for videos needs torchvision, as somebody publishes them."""

    tokenizer: PreTrainedTokenizerFast
    images: Any
    settings: dict[str, Any]
    chat_template: str

    def save_pretrained(self, directory: Path) -> None:
        self.tokenizer.save_pretrained(directory)
        self.images.save_pretrained(directory)
        (directory / "processor_config.json").write_text(json.dumps(self.settings))
        (directory / "chat_template.jinja").write_text(self.chat_template)


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


def _tokenizer(*markers: str, **named: str) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<|im_start|>", "<|im_end|>", "<image>", *markers, *named.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(["What is in this picture? Describe it. A red heart, a blue car, a smiling face."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<|im_end|>",
        extra_special_tokens=named or ["<|im_start|>", "<image>", *markers], model_max_length=4096,
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


def _glm4v() -> Made:
    markers = ["<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>",
               "<|end_of_video|>"]  # fmt: skip
    tokenizer = _tokenizer(*markers)
    ids = dict(zip(markers, tokenizer.convert_tokens_to_ids(markers), strict=True))
    size = {"shortest_edge": 256, "longest_edge": 2304}
    images = Glm4vImageProcessorPil(size=size, patch_size=4, temporal_patch_size=2, merge_size=2)
    config = Glm4vConfig(
        text_config={**QWEN_TEXT, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        vision_config={**QWEN_VISION, "patch_size": 4, "image_size": 32},
        image_token_id=ids["<|image|>"], video_token_id=ids["<|video|>"],
        image_start_token_id=ids["<|begin_of_image|>"], image_end_token_id=ids["<|end_of_image|>"],
        video_start_token_id=ids["<|begin_of_video|>"], video_end_token_id=ids["<|end_of_video|>"],
    )  # fmt: skip
    template = _chat_template("<|begin_of_image|><|image|><|end_of_image|>")
    return config, WithoutVideos(tokenizer, images, {"processor_class": "Glm4vProcessor"}, template)


def _llava_onevision() -> Made:
    tokenizer = _tokenizer("<video>")
    images = LlavaOnevisionImageProcessorPil(size=TILE, image_grid_pinpoints=GRIDS)
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer)},
        vision_config={
            "model_type": "siglip_vision_model", **VISION, "image_size": 32, "patch_size": 8, "vision_use_head": False,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=GRIDS,
        vision_feature_layer=-1,
    )  # fmt: skip
    settings = {
        "processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 16, "vision_feature_select_strategy": "full",
    }  # fmt: skip
    return config, WithoutVideos(tokenizer, images, settings, CHAT_TEMPLATE)


def _idefics2() -> Made:
    tokenizer = _tokenizer("<fake_token_around_image>", "<end_of_utterance>")
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 24, "longest_edge": 32}, do_image_splitting=False)
    config = Idefics2Config(
        text_config={"model_type": "mistral", **TEXT, "vocab_size": len(tokenizer)},
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        perceiver_config={
            "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 8, "num_key_value_heads": 1,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return config, Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT_TEMPLATE)


def _ovis2() -> Made:
    indicators = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer = _tokenizer("<IMG_ATOM>", *indicators)
    images = Ovis2ImageProcessorPil(size=TILE, crop_to_patches=True, max_patches=4)
    config = Ovis2Config(
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer)},
        vision_config={**VISION, "image_size": 32, "patch_size": 8, "vocab_size": 24, "hidden_stride": 2},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(indicators),
        vocab_size=len(tokenizer),
        hidden_size=32,
    )
    return config, Ovis2Processor(images, tokenizer, image_seq_length=4, chat_template=CHAT_TEMPLATE)


def _deepseek_vl() -> Made:
    tokenizer = _tokenizer(image_token="<image_placeholder>")
    images = DeepseekVLImageProcessorPil(size=TILE, min_size=8)
    config = DeepseekVLConfig(
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer)},
        vision_config={**VISION, "image_size": 32, "patch_size": 8, "vision_use_head": False},
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )
    template = _chat_template("<image_placeholder>")
    return config, DeepseekVLProcessor(images, tokenizer, num_image_tokens=16, chat_template=template)


def _chat_template(picture: str) -> str:
    return CHAT_TEMPLATE.replace("'<image>'", f"'{picture}'")


MODELS: dict[str, Callable[[], Made]] = {
    "idefics3": _idefics3, "aya_vision": _aya_vision, "llava_next": _llava_next,
    "glm4v": _glm4v, "llava_onevision": _llava_onevision, "idefics2": _idefics2, "ovis2": _ovis2,
    "deepseek_vl": _deepseek_vl,
}  # fmt: skip
WITH_VIDEOS = ("glm4v", "llava_onevision")
