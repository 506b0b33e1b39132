"""Dagster components: the only place where assets are made. Configure them in `defs.yaml` files."""

from mllm_assets.components.fine_tuning import FineTuning
from mllm_assets.components.image_text_dataset import ImageTextDataset
from mllm_assets.components.pretrained_model import PretrainedModels
from mllm_assets.plugins import load_plugins

__all__ = ["FineTuning", "ImageTextDataset", "PretrainedModels"]

load_plugins()  # before a component reads a YAML file that names what they register
