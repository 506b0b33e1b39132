"""Loading a model's processor: tokenizer, image processor, and what the image's place in the text depends on.

transformers' processors for Gemma 4, Qwen and SmolVLM insist on a video processor, which exists only with torchvision.
Training on images needs none, so for these families the two parts are loaded without the whole.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from mllm_assets.errors import ModelError
from mllm_assets.training.families import Family

PROCESSOR_FILES = ("*processor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
                   "merges.txt", "chat_template.*", "spiece.model")  # fmt: skip


class ImageTextProcessor:
    """Tokenizer and image processor of a model whose whole processor would need more.

    Args:
        directory: The model directory.
        family: Its family.
        vision_config: The vision part of its configuration.
    """

    def __init__(self, directory: Path, family: Family, vision_config: Any) -> None:
        self.stands_for = family.processor
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        self.image_processor: Any = AutoImageProcessor.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        self.directory = directory
        if family.model_type == "smolvlm":
            self.image_seq_len = int(self._config()["image_seq_len"])
            side = self.image_processor.max_image_size["longest_edge"] // vision_config.patch_size
            self.patches_per_tile = side**2

    def save_pretrained(self, directory: Path | str) -> None:
        """Copy the processor's files as they are, those for video included."""
        for pattern in PROCESSOR_FILES:
            for path in self.directory.glob(pattern):
                shutil.copyfile(path, Path(directory) / path.name)

    def _config(self) -> dict[str, Any]:
        return json.loads((self.directory / "processor_config.json").read_text(encoding="utf-8"))


def load(directory: Path, family: Family, config: Any) -> Any:
    """Load the processor of a model directory whose family is known.

    Raises:
        ModelError: Its files are missing or damaged.
    """
    try:
        if family.loads_whole_processor:
            return AutoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        return ImageTextProcessor(directory, family, config.vision_config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{directory} has no usable processor ({type(error).__name__}: {error}). "
            f"Copy tokenizer.json, tokenizer_config.json and processor_config.json of the model into it."
        ) from error
