"""Tiny random models of each family, built in code: config, tokenizer, image processor, chat template; no network.

Every family's real tokenizer has its turn markers as single tokens and encodes bytes; one byte-level BPE with the
family's markers represents them all. Small, so that a training step takes milliseconds.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma4Config,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    PaliGemmaConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)

MARKERS: dict[str, list[str]] = {
    "gemma4": ["<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", "<|image>", "<|image|>", "<image|>",
               "<|video|>", "<|audio>", "<|audio|>", "<audio|>"],
    "qwen2_5_vl": ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
                   "<|video_pad|>"],
    "internvl": ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
    "llava": ["<image>"],
    "smolvlm": ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>",
                *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))],
    "paligemma": ["<image>", "<start_of_turn>", "<end_of_turn>"],
}  # fmt: skip
MARKERS["gemma4_moe"] = MARKERS["gemma4"]
MARKERS["qwen2_vl"] = MARKERS["qwen2_5_vl"]
MARKERS["qwen3_vl"] = [*MARKERS["qwen2_5_vl"], "<think>", "</think>"]
MARKERS["qwen3_vl_moe"] = MARKERS["qwen3_5"] = MARKERS["qwen3_vl"]
NO_BOS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16}
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 4096,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
QWEN_VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
}  # fmt: skip
QWEN_TEXT: dict[str, Any] = TEXT | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}  # fmt: skip
NORMALIZED = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
              "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "rescale_factor": 1 / 255}  # fmt: skip


def build(model_type: str, directory: Path) -> Path:
    """Write a complete model directory of one family and return it."""
    tokenizer = build_tokenizer(model_type)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in MARKERS[model_type]}
    config = CONFIGS[model_type](len(tokenizer), ids)
    for part in (config, config.text_config):
        part.pad_token_id = tokenizer.pad_token_id
        part.bos_token_id = tokenizer.bos_token_id
        part.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for name, content in PROCESSORS[model_type].items():
        (directory / name).write_text(json.dumps(content, indent=1))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATES[model_type])
    return directory


def build_tokenizer(model_type: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with the family's markers as single tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", *MARKERS[model_type]]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(["What is in this picture? Describe it. A red heart, a blue car, a smiling face."], trainer)
    named: dict[str, str] = {
        "gemma4": {"boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>",
                   "boa_token": "<|audio>", "audio_token": "<|audio|>", "eoa_token": "<audio|>"},
        "internvl": {"start_image_token": "<img>", "end_image_token": "</img>",
                     "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
        "paligemma": {"image_token": "<image>"},
    }.get(model_type.removesuffix("_moe"), {})  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<|im_end|>" if model_type == "internvl" else "<eos>",
        bos_token=None if model_type in NO_BOS else "<bos>",
        extra_special_tokens=named or MARKERS[model_type],
        model_max_length=4096,
    )


def _gemma4(vocab_size: int, ids: dict[str, int], **of_text: Any) -> Any:
    text = Gemma4TextConfig(
        vocab_size=vocab_size, vocab_size_per_layer_input=vocab_size, hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"], global_head_dim=16, sliding_window=512,
        use_bidirectional_attention="vision", **TEXT, **of_text,
    )  # fmt: skip
    vision = Gemma4VisionConfig(
        **VISION, num_key_value_heads=2, head_dim=8, patch_size=4, pooling_kernel_size=2, position_embedding_size=128
    )
    return Gemma4Config(
        text_config=text, vision_config=vision, audio_config=None, boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"], image_token_id=ids["<|image|>"], video_token_id=ids["<|video|>"],
        boa_token_id=ids["<|audio>"], audio_token_id=ids["<|audio|>"], eoa_token_index=ids["<audio|>"],
    )  # fmt: skip


def _gemma4_moe(vocab_size: int, ids: dict[str, int]) -> Any:
    return _gemma4(vocab_size, ids, enable_moe_block=True, top_k_experts=2, **EXPERTS)


def _qwen_ids(ids: dict[str, int]) -> dict[str, int]:
    return {
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
    }  # fmt: skip


def _qwen2_5_vl(vocab_size: int, ids: dict[str, int]) -> Any:
    text = {key: value for key, value in QWEN_TEXT.items() if key != "head_dim"}
    # windows of 2 x 2 merged patches, so that a picture has several and their order matters
    vision = QWEN_VISION | {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1], "spatial_merge_size": 2}
    return Qwen2_5_VLConfig(text_config=text | {"vocab_size": vocab_size}, vision_config=vision, **_qwen_ids(ids))


def _qwen2_vl(vocab_size: int, ids: dict[str, int]) -> Any:
    text = {key: value for key, value in QWEN_TEXT.items() if key != "head_dim"}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    return Qwen2VLConfig(text_config=text | {"vocab_size": vocab_size}, vision_config=vision, **_qwen_ids(ids))


def _qwen3_vl_moe(vocab_size: int, ids: dict[str, int]) -> Any:
    text = QWEN_TEXT | EXPERTS | {"vocab_size": vocab_size, "num_experts_per_tok": 2}
    vision = QWEN_VISION | {"patch_size": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, **_qwen_ids(ids))


def _qwen3_5(vocab_size: int, ids: dict[str, int]) -> Any:
    """One layer of linear attention, one of full, as every fourth is in the real ones."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    text = TEXT | {
        "vocab_size": vocab_size, "layer_types": ["linear_attention", "full_attention"], "rope_parameters": rope,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    }  # fmt: skip
    vision = QWEN_VISION | {"patch_size": 4, "num_position_embeddings": 64}
    return Qwen3_5Config(text_config=text, vision_config=vision, **_qwen_ids(ids))


def _qwen3_vl(vocab_size: int, ids: dict[str, int]) -> Any:
    vision = QWEN_VISION | {"patch_size": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(text_config=QWEN_TEXT | {"vocab_size": vocab_size}, vision_config=vision, **_qwen_ids(ids))


def _internvl(vocab_size: int, ids: dict[str, int]) -> Any:
    return InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": vocab_size},
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
    )


def _llava(vocab_size: int, ids: dict[str, int]) -> Any:
    vision = CLIPVisionConfig(**VISION, image_size=32, patch_size=8, projection_dim=16)
    text = LlamaConfig(vocab_size=vocab_size, **TEXT)
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=ids["<image>"], image_seq_length=16)


def _smolvlm(vocab_size: int, ids: dict[str, int]) -> Any:
    text = {"model_type": "llama", "vocab_size": vocab_size, **TEXT}
    vision = VISION | {"image_size": 32, "patch_size": 8}
    return SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=2, image_token_id=ids["<image>"])


def _paligemma(vocab_size: int, ids: dict[str, int]) -> Any:
    vision = SiglipVisionConfig(**VISION, image_size=32, patch_size=8, vision_use_head=False, projection_dim=32)
    text = Gemma2Config(vocab_size=vocab_size, query_pre_attn_scalar=16, sliding_window=512, **TEXT)
    text.num_image_tokens = 16
    return PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=ids["<image>"], projection_dim=32, hidden_size=32
    )


CONFIGS: dict[str, Callable[[int, dict[str, int]], Any]] = {
    "gemma4": _gemma4, "gemma4_moe": _gemma4_moe, "qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl, "qwen3_vl_moe": _qwen3_vl_moe, "qwen3_5": _qwen3_5, "internvl": _internvl,
    "llava": _llava, "smolvlm": _smolvlm,
    "paligemma": _paligemma,
}  # fmt: skip

QWEN_IMAGES = NORMALIZED | {
    "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2,
    "size": {"shortest_edge": 256, "longest_edge": 2304},
}  # fmt: skip
QWEN_VIDEOS = {key: value for key, value in QWEN_IMAGES.items() if key != "image_processor_type"} | {
    "video_processor_type": "Qwen3VLVideoProcessor", "size": {"shortest_edge": 256, "longest_edge": 9216},
}  # fmt: skip
# File layouts as on the Hub: some keep all in processor_config.json, some have preprocessor_config.json beside it
PROCESSORS: dict[str, dict[str, Any]] = {
    "gemma4": {
        "processor_config.json": {
            "processor_class": "Gemma4Processor", "image_seq_length": 70,
            "image_processor": {
                "image_processor_type": "Gemma4ImageProcessor", "patch_size": 4, "pooling_kernel_size": 2,
                "max_soft_tokens": 70, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255,
                "do_normalize": False,
            },
        }
    },
    "qwen2_5_vl": {"preprocessor_config.json": QWEN_IMAGES | {"processor_class": "Qwen2_5_VLProcessor"}},
    "qwen3_vl": {
        "preprocessor_config.json": QWEN_IMAGES | {"processor_class": "Qwen3VLProcessor"},
        # as on the Hub; the limits are those of all frames together
        "video_preprocessor_config.json": QWEN_VIDEOS,
    },
    "llava": {
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": 8,
            "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",
            "image_processor": NORMALIZED | {
                "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32},
                "crop_size": {"height": 32, "width": 32}, "do_center_crop": True,
            },
        }
    },
    "smolvlm": {
        "processor_config.json": {"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
        "preprocessor_config.json": NORMALIZED | {
            "image_processor_type": "SmolVLMImageProcessor", "size": {"longest_edge": 64},
            "max_image_size": {"longest_edge": 32}, "do_image_splitting": True, "do_pad": True,
            "processor_class": "SmolVLMProcessor",
        },
    },
    "paligemma": {
        "processor_config.json": {
            "processor_class": "PaliGemmaProcessor",
            "image_processor": NORMALIZED | {
                "image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32},
                "image_seq_length": 16,
            },
        }
    },
}  # fmt: skip
PROCESSORS["internvl"] = {
    "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": 4},
    "preprocessor_config.json": NORMALIZED | {
        "image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 32, "width": 32},
        "crop_to_patches": False, "max_patches": 12, "min_patches": 1,
    },
}  # fmt: skip
PROCESSORS["gemma4_moe"] = PROCESSORS["gemma4"]
PROCESSORS["qwen2_vl"] = {"preprocessor_config.json": QWEN_IMAGES | {"processor_class": "Qwen2VLProcessor"}}
PROCESSORS["qwen3_vl_moe"] = PROCESSORS["qwen3_5"] = PROCESSORS["qwen3_vl"]

_QWEN_CHAT = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else -%}{{ item['text'] }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
# SmolVLM's is the real one (HuggingFaceTB/SmolVLM-Instruct): its turn format is taken from it
CHAT_TEMPLATES: dict[str, str] = {
    "gemma4": "",
    "gemma4_moe": "",
    **dict.fromkeys(NO_BOS, _QWEN_CHAT),
    "internvl": _QWEN_CHAT.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\\n"),
    "llava": "",
    "paligemma": "",
    "smolvlm": "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
}
VARIANTS = ("gemma4_moe",)  # of a family: with experts
FAMILIES = tuple(name for name in CONFIGS if name not in VARIANTS)
