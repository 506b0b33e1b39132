"""Run by a Python that has transformers 4.57 in front of its own: `python -P older_transformers.py 4.57-FOLDER FOLDER`.

Each folder in FOLDER has a model's directory `model` and `batch.pt`, what it is asked. Prints one JSON object.
"""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

TEXT = "<bos>What is in it?\n\nA <end_of_turn>"


def answers(folder: Path) -> dict[str, Any]:
    """What one model, its tokenizer and its image processor make of a fixed question."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    directory, options = folder / "model", {"local_files_only": True, "trust_remote_code": False}
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, **options)
    images: Any = AutoImageProcessor.from_pretrained(directory, **options)
    picture = Image.linear_gradient("L").convert("RGB")
    loader: Any = AutoModelForImageTextToText
    model, info = loader.from_pretrained(directory, output_loading_info=True, dtype="auto", **options)
    batch = torch.load(folder / "batch.pt")
    known = inspect.signature(type(model).forward).parameters
    with torch.inference_mode():
        logits = model.eval()(**{name: batch[name] for name in batch if name in known}).logits
    return {
        "num_wrong_keys": sum(len(info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")),
        "ids": [tokenizer(TEXT).input_ids, tokenizer(TEXT, add_special_tokens=False).input_ids],
        "decoded": tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True),
        "pixels": images(picture, return_tensors="pt")["pixel_values"].double().mean().item(),
        "logits": logits[0, -1].tolist(),
    }


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import transformers

    transformers.logging.set_verbosity_error()
    found = {folder.name: answers(folder) for folder in sorted(Path(sys.argv[2]).iterdir())}
    print(json.dumps({"version": transformers.__version__, "answers": found}))
