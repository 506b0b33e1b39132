"""A new recipe from the few values that a person chooses, as the file that LLaMA-Factory and `mllm-assets run` read."""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mllm_assets.artifacts import slug, write_text_atomic
from mllm_assets.errors import RecipeError
from mllm_assets.recipe.load import Recipe, load_recipe

# what trains, in a person's words, and LLaMA-Factory's keys for it; its default freezes the tower and the projector
METHODS: Mapping[str, Mapping[str, Any]] = {
    "projector": {
        "finetuning_type": "full", "freeze_language_model": True, "freeze_multi_modal_projector": False,
    },
    "LoRA in the text model": {"finetuning_type": "lora", "lora_target": "all"},
    "LoRA on a text model of 4 bits (QLoRA)": {
        "finetuning_type": "lora", "lora_target": "all", "quantization_bit": 4, "quantization_method": "bnb",
    },
    "last two text layers and projector": {
        "finetuning_type": "freeze", "freeze_trainable_layers": 2, "freeze_multi_modal_projector": False,
    },
    "text model and projector": {"finetuning_type": "full", "freeze_multi_modal_projector": False},
    "everything": {
        "finetuning_type": "full", "freeze_vision_tower": False, "freeze_multi_modal_projector": False,
        "freeze_language_model": False,
    },
}  # fmt: skip
MAX_EVALUATIONS = 10  # of a run, so that its curve has points


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeDraft:
    """The values of a new recipe; `method` is one of `METHODS`, `entry` one or several, `eval_entry` may be empty.

    `epochs` above 0 are trained instead of `max_steps`.
    """

    name: str
    model: str
    template: str
    entry: str
    eval_entry: str = ""
    method: str = "LoRA in the text model"
    lora_rank: int = 8
    max_steps: int = 200
    epochs: float = 0
    learning_rate: float = 1e-4
    batch_size: int = 8
    accumulation: int = 1
    cutoff_len: int = 1024
    seed: int = 42
    bf16: bool = False

    def to_yaml(self) -> str:
        """The file's text, in the sections of LLaMA-Factory's examples.

        Raises:
            RecipeError: The name has no letter or digit, or what should train is unknown.
        """
        if self.method not in METHODS:
            raise RecipeError(f"{self.method!r} is not something that can train: choose one of {', '.join(METHODS)}.")
        method = dict(METHODS[self.method])
        if method["finetuning_type"] == "lora":
            method["lora_rank"] = self.lora_rank
        every = max(1, self.max_steps // MAX_EVALUATIONS)
        saves: dict[str, Any] = {"logging_steps": max(1, self.max_steps // 40), "save_steps": every}
        lasts: dict[str, Any] = {"max_steps": self.max_steps}
        evaluates: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": every}
        if self.epochs:
            saves, lasts = {"logging_steps": 10, "save_strategy": "epoch"}, {"num_train_epochs": self.epochs}
            evaluates = {"eval_strategy": "epoch"}
        sections: dict[str, dict[str, Any]] = {
            "model": {"model_name_or_path": self.model, "stage": "sft", "do_train": True},
            "method": method,
            "dataset": {
                "dataset_dir": "data", "dataset": self.entry,
                **({"eval_dataset": self.eval_entry} if self.eval_entry else {}),
                "template": self.template, "cutoff_len": self.cutoff_len,
            },
            "output": {
                "output_dir": f"outputs/{slug(self.name)}", **saves,
                "save_total_limit": 2, "plot_loss": True, "report_to": "tensorboard",
            },
            "train": {
                "per_device_train_batch_size": self.batch_size, "gradient_accumulation_steps": self.accumulation,
                "learning_rate": self.learning_rate, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1,
                **lasts, "seed": self.seed, **({"bf16": True} if self.bf16 else {}),
            },
        }  # fmt: skip
        if self.eval_entry:
            sections["eval"] = {"per_device_eval_batch_size": self.batch_size, **evaluates}
        return "\n".join(
            f"### {title}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"
            for title, values in sections.items()
        )


def renamed(text: str, name: str) -> str:
    """A recipe's text as that of another one, which writes to a folder of its own; all else stays as it is written."""
    return re.sub(r"^output_dir:.*$", f"output_dir: outputs/{slug(name)}", text, flags=re.MULTILINE)


def read_draft(name: str, text: str | None) -> Recipe:
    """Read a recipe's text as its file would be read; a page's field that is empty may give None.

    Raises:
        RecipeError: As `load_recipe`.
    """
    with tempfile.TemporaryDirectory(prefix="mllm_assets_") as folder:
        path = Path(folder, f"{slug(name)}.yaml")
        path.write_text(text or "", encoding="utf-8")
        try:
            return load_recipe(path)
        except RecipeError as error:
            raise RecipeError(str(error).replace(str(path), "the recipe")) from error


def write_draft(root: Path, name: str, text: str | None) -> Path:
    """Write a recipe that can be read to `configs/<name>.yaml`; the very same one may be there already.

    Raises:
        RecipeError: It cannot be read, or `configs/` has another recipe of this name.
    """
    read_draft(name, text)
    assert text is not None, "an empty recipe is refused"
    path = root / "configs" / f"{slug(name)}.yaml"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise RecipeError(
            f"configs/{path.name} exists and says something else. Choose another name, or edit that file: a recipe "
            "is not overwritten here."
        )
    write_text_atomic(path, text)
    return path
