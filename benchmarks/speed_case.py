"""What the training benchmark trains: a Gemma 3 with gemma-3-4b's proportions in small, and captioned pictures."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from mllm_assets import sample_data
from mllm_assets.training.models.tiny import build_tokenizer, processor_config

IMAGE_SIZE_PX, PATCH_SIZE_PX = 336, 14
NUM_IMAGE_TOKENS = 36  # one for 4 x 4 patches, as in gemma-3-4b
PROMPT = "Describe this picture in one sentence."

# Recipe keys of each case; what they train is LLaMA-Factory's reading of them
CASES: dict[str, dict[str, Any]] = {
    "projector only": {
        "finetuning_type": "full", "freeze_language_model": True, "freeze_multi_modal_projector": False,
    },
    "last 2 layers + projector": {
        "finetuning_type": "freeze", "freeze_trainable_layers": 2, "freeze_multi_modal_projector": False,
    },
    "last 2 layers only": {"finetuning_type": "freeze", "freeze_trainable_layers": 2},
    "LoRA": {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"},
}  # fmt: skip


def make_model(directory: Path, *, vocab_size: int) -> None:
    """Write the model: tower 12 x 384 at 336 px, language model 10 x 384, random weights in float32."""
    tokenizer = build_tokenizer()
    ids = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    config = Gemma3Config(
        text_config=Gemma3TextConfig(
            vocab_size=vocab_size, hidden_size=384, intermediate_size=1536, num_hidden_layers=10,
            num_attention_heads=6, num_key_value_heads=3, head_dim=64, query_pre_attn_scalar=64,
            max_position_embeddings=2048, sliding_window=1024, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6,
            image_size=IMAGE_SIZE_PX, patch_size=PATCH_SIZE_PX, vision_use_head=False,
        ),
        mm_tokens_per_image=NUM_IMAGE_TOKENS,
        boi_token_index=ids["<start_of_image>"], eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"], tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(20260801)
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.05)  # zeros otherwise
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    processing = processor_config()
    processing["image_processor"] |= {
        "image_seq_length": NUM_IMAGE_TOKENS, "size": {"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX},
    }  # fmt: skip
    processing["image_seq_length"] = NUM_IMAGE_TOKENS
    (directory / "processor_config.json").write_text(json.dumps(processing))


def make_data(directory: Path, *, num_rows: int, long_captions: bool = False) -> None:
    """Write a ShareGPT directory: embedded pictures at 512 px, each with its name as caption, or four names."""
    (directory / "images").mkdir(parents=True)
    path = Path(sample_data.__file__).with_name("emoji.parquet")
    table = pq.read_table(path, columns=["image", "text"]).slice(0, 4 * num_rows).to_pylist()
    rows = []
    for index in range(num_rows):
        name = f"images/{index:03d}.jpg"
        picture = Image.open(io.BytesIO(table[index]["image"]["bytes"])).convert("RGB")
        picture.resize((512, 512)).save(directory / name, quality=90)
        names = [table[index + k * num_rows]["text"] for k in range(4 if long_captions else 1)]
        caption = ", ".join(names) + "."
        messages = [
            {"role": "user", "content": f"<image>{PROMPT}"},
            {"role": "assistant", "content": caption},
        ]
        rows.append({"messages": messages, "images": [name]})
    (directory / "train.json").write_text(json.dumps(rows))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {
        "file_name": "train.json", "formatting": "sharegpt", "tags": tags,
        "columns": {"messages": "messages", "images": "images"},
    }  # fmt: skip
    (directory / "dataset_info.json").write_text(json.dumps({"bench": entry}))


def recipe_keys(case: str, *, num_steps: int, bf16: bool) -> dict[str, Any]:
    """Return the recipe that all three trainers run."""
    return {
        "stage": "sft", "do_train": True, "template": "gemma3", "dataset": "bench", "cutoff_len": 1024,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": num_steps,
        "learning_rate": 1.0e-4, "lr_scheduler_type": "cosine", "logging_steps": 1, "save_strategy": "no",
        "seed": 42, "bf16": bf16, "use_cpu": True, "optim": "adamw_torch", "disable_gradient_checkpointing": True,
        **CASES[case],
    }  # fmt: skip
