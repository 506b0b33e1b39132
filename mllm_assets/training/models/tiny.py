"""A Gemma 3 of about 1.5 million random weights, built in code: the same bytes every time, no network.

Every weight is drawn by numpy's PCG64 in the order of the parameters' names, so that neither the version of torch
nor the width of the machine's vectors changes them.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaTokenizer,
    GenerationConfig,
    SiglipVisionConfig,
)

from mllm_assets import sample_data
from mllm_assets.artifacts import digest_json, is_sound, read_manifest, sha256_file, staged_directory, write_manifest
from mllm_assets.training.models.load import quiet_libraries
from mllm_assets.training.models.publishing import SENTENCEPIECE
from mllm_assets.training.models.sentencepiece_file import all_splits, sentencepiece_file

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter
    from mllm_assets.worker.tasks import BuildTask

SEED = 20260801
NUM_IMAGE_TOKENS = 16
IMAGE_SIZE_PX = 64
PATCH_SIZE_PX = 8
VOCAB_SIZE = 768
SPECIAL_TOKENS = (
    "<pad> <eos> <bos> <unk> <mask> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image> <image_soft_token>"
).split()
# Gemma 3 has one token for each run of newlines; the turn format depends on "\n" and "\n\n\n".
NEWLINES = tuple("\n" * count for count in range(1, 6))
# Questions that the embedded dataset asks, and some that a user would
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


def build_task(task: "BuildTask", reporter: "Reporter") -> dict[str, Any]:
    """Worker entry: build the model and return its manifest."""
    reporter.progress("build_pretrained", 0, 1)
    manifest = build(task.directory)
    reporter.progress("build_pretrained", 1, 1)
    return manifest


def build(directory: Path) -> dict[str, Any]:
    """Write model, tokenizer, chat template and processor, and return the manifest.

    A sound directory is left unchanged. `fingerprint` in the manifest is a digest over all files.
    """
    if is_sound(directory):
        return read_manifest(directory)
    with staged_directory(directory) as staging:
        tokenizer = build_tokenizer()
        tokenizer.save_pretrained(staging)
        (staging / SENTENCEPIECE).write_bytes(_sentencepiece(tokenizer))
        model = build_model(tokenizer)
        quiet_libraries()
        model.save_pretrained(staging)
        _as_on_the_hub(staging / "model.safetensors")
        processor = json.dumps(processor_config(), indent=2) + "\n"
        (staging / "processor_config.json").write_text(processor, encoding="utf-8")
        files = {path.relative_to(staging).as_posix(): sha256_file(path) for path in sorted(staging.rglob("*.*"))}
        num_params = sum(p.numel() for p in model.parameters())
        facts = {"model": "gemma3_tiny", "fingerprint": digest_json(files), "num_params": num_params, "seed": SEED}
        return write_manifest(staging, facts)


def _as_on_the_hub(path: Path) -> None:
    """Name the tower's tensors as Google's files do: transformers 4 and llama.cpp read no other names."""
    tensors = load_file(path)
    old, new = "vision_tower.", "vision_tower.vision_model."
    save_file({name.replace(old, new, 1): tensor for name, tensor in tensors.items()}, path, {"format": "pt"})


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
    by_token = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS), strict=True))
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
        return np.full(shape, 1.0 if "vision_tower" in name else 0.0, dtype=np.float32)
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
        merges=list(all_splits(model["vocab"], merges)),  # pyright: ignore[reportArgumentType]
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=8192,
    )


def _sentencepiece(tokenizer: Any) -> bytes:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return sentencepiece_file(model["vocab"], [tuple(merge) for merge in model["merges"]], SPECIAL_TOKENS, "<unk>")


def _corpus() -> Iterator[str]:
    table = pq.read_table(Path(sample_data.__file__).with_name("emoji.parquet"), columns=["text", "group"])
    features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
    names = features["group"]["names"]
    yield from table["text"].to_pylist()
    yield from [names[group] for group in table["group"].to_pylist()]
    yield from ["user", "model", *PROMPTS] * 20
