"""A Gemma 3 with gemma-3-4b's widths and one layer each, in bfloat16: kernels are chosen by widths, not by depth."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

from mllm_assets.training.models import tiny

IMAGE_SIZE_PX, PATCH_SIZE_PX, NUM_IMAGE_TOKENS = 224, 14, 16
TEXT = {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "query_pre_attn_scalar": 256, "num_hidden_layers": 1}  # fmt: skip
VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 1}


def build(directory: Path, dtype: torch.dtype = torch.bfloat16, **text: Any) -> Path:
    """Write a complete model directory with random weights, and return it; `text` are other sizes of the text model."""
    tokenizer = tiny.build_tokenizer()
    template = tiny.build_config(tokenizer)
    ids = {name: getattr(template, name) for name in ("boi_token_index", "eoi_token_index", "image_token_index")}
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = Gemma3Config(
        text_config=Gemma3TextConfig(vocab_size=len(tokenizer), **special, **(TEXT | text)),
        vision_config=SiglipVisionConfig(
            image_size=IMAGE_SIZE_PX, patch_size=PATCH_SIZE_PX, vision_use_head=False, **VISION
        ),
        mm_tokens_per_image=NUM_IMAGE_TOKENS, eos_token_id=template.eos_token_id, tie_word_embeddings=True, **ids,
    )  # fmt: skip
    torch.manual_seed(7)
    model: Any = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.03)
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    processor = tiny.processor_config()
    processor["image_processor"]["size"] = {"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX}
    (directory / "processor_config.json").write_text(json.dumps(processor))
    return directory
