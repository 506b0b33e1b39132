"""Fine-tune vision-language models as Dagster software-defined assets."""

__version__ = "0.1.0"
