"""Load a released model as any user would: run by its path, `python -I reload_check.py DIRECTORY [BASE_MODEL]`.

Imports nothing of this project, so that what it loads, transformers and peft load alone. Prints one JSON object.
"""

import json
import sys
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

QUESTION = "What is in this picture?"
ANSWER = "A gradient."


def fixed_batch(directory: str) -> dict[str, Any]:
    """A gradient with a question and an answer, through the directory's processor and chat template."""
    picture = Image.merge(
        "RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("L", (256, 256), 128)]
    )
    question = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    conversation = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
    ]
    processor = AutoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    batch = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
    return {**batch, "labels": batch["input_ids"]}


@torch.inference_mode()
def loss_and_logits(model: Any, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
    pixels = batch["pixel_values"].to(model.dtype)
    output = model.eval()(**{**batch, "pixel_values": pixels})
    return float(output.loss), output.logits.float()


def load(directory: str, **options: Any) -> Any:
    loader: Any = AutoModelForImageTextToText
    return loader.from_pretrained(directory, dtype="auto", local_files_only=True, trust_remote_code=False, **options)


def main(directory: str, base_model: str | None = None) -> dict[str, Any]:
    """Return what loading gave, with the adapter on its base model where one is named."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, info = load(directory, output_loading_info=True)
    batch = fixed_batch(directory)
    loss, logits = loss_and_logits(model, batch)
    result: dict[str, Any] = {
        **{f"num_{kind}": len(info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")},
        "num_params": model.num_parameters(),
        "dtype_eps": torch.finfo(model.dtype).eps,
        "loss": loss,
    }
    del model
    if base_model is not None:
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(load(base_model), f"{directory}/adapter")
        adapter_loss, adapter_logits = loss_and_logits(adapted, batch)
        difference = float((adapter_logits - logits).abs().max())
        result |= {"adapter_loss": adapter_loss, "adapter_max_logit_difference": difference}
    result["imported_mllm_assets"] = any(name.split(".")[0] == "mllm_assets" for name in sys.modules)
    return result


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
