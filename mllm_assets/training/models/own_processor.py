"""The processor of a model of a family that is not described here: it makes all that the model reads."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from mllm_assets.artifacts import digest_json, sha256_file
from mllm_assets.errors import DataError, ModelError
from mllm_assets.families.family import Family

PROCESSOR_FILES = ("*processor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
                   "merges.txt", "chat_template.*", "spiece.model")  # fmt: skip


def copy_processor_files(source: Path, directory: Path) -> None:
    """Copy tokenizer, chat template and the processor's settings unchanged."""
    for path in _files(source):
        shutil.copyfile(path, directory / path.name)


def _files(directory: Path) -> list[Path]:
    return sorted({path for pattern in PROCESSOR_FILES for path in directory.glob(pattern)})


def _read(directory: Path, config: Any) -> Any:
    """The model's processor; where torchvision is missing, without the part for videos, which needs it.

    Raises:
        ModelError: It needs torchvision for pictures too.
    """
    try:
        return AutoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ImportError, ValueError) as error:
        if "torchvision" not in str(error).lower():
            raise
        try:
            return _without_videos(directory, config)
        except (ImportError, KeyError, TypeError, ValueError):
            raise ModelError(
                f"The processor in {directory} needs torchvision. Install it beside your torch: "
                "pip install torchvision."
            ) from error


def _without_videos(directory: Path, config: Any) -> Any:
    kind: Any = PROCESSOR_MAPPING[type(config)]
    parts = [name for name in kind.get_attributes() if name != "video_processor"]
    pictures_only: Any = type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: list(parts))})
    return pictures_only.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


class OwnProcessor:
    """A model's own processor, its parts, and batches of rendered texts with their pictures.

    Args:
        directory: Of the model.
        family: Of the model.
        config: Its configuration.

    Raises:
        ModelError: It reads no pictures, or needs torchvision for them, which is not installed.
    """

    def __init__(self, directory: Path, family: Family, config: Any) -> None:
        self.directory, self.family = directory, family
        self.whole = _read(directory, config)
        if not hasattr(self.whole, "image_processor") or not hasattr(self.whole, "tokenizer"):
            raise ModelError(
                f"The processor in {directory} is a {type(self.whole).__name__}, which reads no pictures with a text. "
                "Use an instruct model with its own processor's files."
            )
        self.tokenizer, self.image_processor = self.whole.tokenizer, self.whole.image_processor
        self.chat_template = self.whole.chat_template or self.tokenizer.chat_template
        known = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
        self.image_token_id = int(next((token for token in known if token is not None), -1))

    def batch(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], names: str, side: str = "right"
    ) -> dict[str, torch.Tensor]:
        """What the model reads of rendered conversations, padded on a side; each has its pictures in order.

        Raises:
            DataError: The processor does not take them. Begins with the names of the rows.
        """
        bos = self.tokenizer.bos_token
        # As the library's `apply_chat_template(tokenize=True)`
        options = {"add_special_tokens": False} if bos is not None and texts[0].startswith(bos) else {}
        try:
            made = self.whole(
                text=list(texts),
                images=[list(some) for some in images] if any(images) else None,
                padding=len(texts) > 1,
                padding_side=side,
                return_tensors="pt",
                **options,
            )
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise DataError(
                f"The model's processor does not take row {names} ({type(error).__name__}: {str(error)[:200]}). "
                "Several rows may need batches of 1; else drop the row."
            ) from error
        return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}

    def describe(self) -> list[Any]:
        """All that what it makes depends on, as JSON."""
        files = {path.name: sha256_file(path) for path in _files(self.directory)}
        return [type(self.whole).__name__, digest_json(files), self.chat_template]

    def save_pretrained(self, directory: Path | str) -> None:
        """Copy the processor's files unchanged."""
        copy_processor_files(self.directory, Path(directory))
