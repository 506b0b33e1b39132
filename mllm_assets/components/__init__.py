"""Dagster components: the only place where assets are made. Configure them in `defs.yaml` files."""

from mllm_assets.components.fine_tuning import FineTuning
from mllm_assets.components.image_text_dataset import ImageTextDataset
from mllm_assets.components.pretrained_model import PretrainedModels

__all__ = ["FineTuning", "ImageTextDataset", "PretrainedModels"]
