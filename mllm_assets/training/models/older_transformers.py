"""What transformers 4.57 reads, next to what 5 writes, so that both load the same model from one directory.

Version 4 knows nothing of `rope_parameters` and takes its defaults, without a word: gemma-3-4b's global positions would
be eight times too far apart. It ends at the list of `extra_special_tokens` and at the tokenizer class of version 5.
Version 5 reads what both write.
Not covered: names of tensors, which are those of the model that training started from; see `oldest_reader`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mllm_assets.artifacts import write_json_atomic
from mllm_assets.families.family import SUPPORTED, family_of

QWEN_IMAGES = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast")


def add_old_spelling(directory: Path, tokenizer: Any) -> None:
    """Write the keys of version 4 into a saved model's `config.json` and `tokenizer_config.json`.

    Models of a family with which version 4 does not compute the same stay as they are.
    """
    config = json.loads((directory / "config.json").read_bytes())
    if not family_of(config["model_type"]).in_transformers_4:
        return
    text = config.get("text_config", config)
    text |= _positions(text.get("rope_parameters") or {})
    write_json_atomic(directory / "config.json", config)
    path = directory / "tokenizer_config.json"
    write_json_atomic(path, _tokenizer_settings(json.loads(path.read_bytes()), tokenizer))
    if (images := directory / "preprocessor_config.json").is_file():
        write_json_atomic(images, _image_settings(json.loads(images.read_bytes())))


def oldest_reader(directory: Path) -> str:
    """The oldest version of transformers that computes the same from a model's directory.

    Version 4 calls what is in a tower `vision_tower.vision_model.*`, as the files on the Hub do.
    """
    config = json.loads((directory / "config.json").read_bytes())
    family = family_of(config["model_type"])
    in_towers = [name for name in tensor_names(directory) if "vision_tower." in name]
    if family.in_transformers_4 and not all("vision_tower.vision_model." in name for name in in_towers):
        return SUPPORTED
    return family.transformers_since


def tensor_names(directory: Path) -> Iterator[str]:
    """The names in the headers of a model's safetensors files."""
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            yield from file.keys()


def _positions(rope: dict[str, Any]) -> dict[str, Any]:
    """The rotary positions' parameters as version 4 spells them: scaling apart, and one base for each kind of layer."""
    if "full_attention" in rope:
        return _positions(rope["full_attention"]) | {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
    if "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    is_plain = scaling == {"rope_type": "default"}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if is_plain else scaling}


def _tokenizer_settings(settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    settings = dict(settings)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(listed := settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = listed
        settings["extra_special_tokens"] = settings.get("model_specific_special_tokens", {})
    if "add_bos_token" not in settings:  # version 4 adds it where nothing is said, whatever tokenizer.json does
        settings["add_bos_token"] = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return settings


def _image_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Version 4 takes its own `size` for Qwen's pictures, whatever is written, unless it finds numbers of pixels."""
    size = settings.get("size")
    if settings.get("image_processor_type") in QWEN_IMAGES and size and "min_pixels" not in settings:
        return settings | {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    return settings
