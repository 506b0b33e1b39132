"""A Gemma 3 of about 1.5 million random weights, built in code: the same bytes every time, no network.

Every weight is drawn by numpy's PCG64 in the order of the parameters' names, so that neither the version of torch
nor the width of the machine's vectors changes them.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    SiglipVisionConfig,
)

from mllm_assets.artifacts import digest_json, is_complete, read_manifest, sha256_file, staged_directory, write_manifest
from mllm_assets.training.tiny_tokenizer import SPECIAL_TOKENS, build_tokenizer

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter

SEED = 20260801
NUM_IMAGE_TOKENS = 16
IMAGE_SIZE_PX = 64
PATCH_SIZE_PX = 8


def build_task(request: dict[str, Any], reporter: "Reporter") -> dict[str, Any]:
    """Worker entry: build the model below `request["directory"]` and return its manifest."""
    reporter.progress("build_pretrained", 0, 1)
    manifest = build(Path(request["directory"]))
    reporter.progress("build_pretrained", 1, 1)
    return manifest


def build(directory: Path) -> dict[str, Any]:
    """Write model, tokenizer, chat template and processor, and return the manifest.

    A complete directory is returned as it is. `fingerprint` in the manifest is a digest over all files.
    """
    if is_complete(directory):
        return read_manifest(directory)
    with staged_directory(directory) as staging:
        tokenizer = build_tokenizer()
        tokenizer.save_pretrained(staging)
        model = build_model(tokenizer)
        model.save_pretrained(staging)
        (staging / "processor_config.json").write_text(
            json.dumps(processor_config(), indent=2) + "\n", encoding="utf-8"
        )
        files = {path.relative_to(staging).as_posix(): sha256_file(path) for path in sorted(staging.rglob("*.*"))}
        return write_manifest(
            staging,
            {
                "model": "gemma3_tiny",
                "fingerprint": digest_json(files),
                "num_params": sum(p.numel() for p in model.parameters()),
                "seed": SEED,
            },
        )


def build_config(tokenizer: Any) -> Any:
    """Return the shape: text 4 x 128, tower 3 x 128 at 64 px, 16 image tokens."""
    text = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=8192,
        sliding_window=1024,
        initializer_range=0.04,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE_PX,
        patch_size=PATCH_SIZE_PX,
        vision_use_head=False,
    )
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    by_token = dict(zip(SPECIAL_TOKENS, ids, strict=True))
    return Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=NUM_IMAGE_TOKENS,
        boi_token_index=by_token["<start_of_image>"],
        eoi_token_index=by_token["<end_of_image>"],
        image_token_index=by_token["<image_soft_token>"],
        eos_token_id=[by_token["<eos>"], by_token["<end_of_turn>"]],  # pyright: ignore[reportCallIssue]
        tie_word_embeddings=True,
    )


def build_model(tokenizer: Any) -> Gemma3ForConditionalGeneration:
    """Return the float32 model with its seeded weights."""
    config = build_config(tokenizer)
    model = Gemma3ForConditionalGeneration(config)
    draw = np.random.Generator(np.random.PCG64(SEED))
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.from_numpy(_initial(name, tuple(parameter.shape), draw)))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=config.eos_token_id,
        do_sample=False,
    )
    return model


def _initial(name: str, shape: tuple[int, ...], draw: np.random.Generator) -> np.ndarray:
    """Return one parameter's first value: Gemma's norms are centred on 1 + weight, SigLIP's on weight."""
    if name.endswith("bias"):
        return np.zeros(shape, dtype=np.float32)
    if len(shape) == 1:
        siglip_norm = "vision_tower" in name
        return np.full(shape, 1.0 if siglip_norm else 0.0, dtype=np.float32)
    std = 0.04
    if "vision_tower" in name:
        # Glorot for SigLIP's linears, LeCun for its patch convolution, as transformers does
        fan_in = math.prod(shape[1:])
        std = math.sqrt(1 / fan_in) if len(shape) == 4 else math.sqrt(2 / (fan_in + shape[0]))
    return draw.standard_normal(shape, dtype=np.float32) * np.float32(std)


def processor_config() -> dict[str, Any]:
    """Return what `AutoProcessor` reads; SigLIP wants mean and deviation 0.5."""
    return {
        "image_processor": {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": NUM_IMAGE_TOKENS,
            "image_std": [0.5, 0.5, 0.5],
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX},
        },
        "image_seq_length": NUM_IMAGE_TOKENS,
        "processor_class": "Gemma3Processor",
    }
