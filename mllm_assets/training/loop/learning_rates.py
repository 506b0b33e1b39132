"""What of the model learns at which rate, where a recipe gives more than one.

`loraplus_lr_ratio` groups parameters as LLaMA-Factory does (0.9.5, `train/trainer_utils.py`), for LoRA+
(arXiv:2402.12354); `vision_lr` and `projector_lr` as 2U1's trainers. The schedule multiplies each rate alike.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from mllm_assets.families.family import Family
from mllm_assets.recipe.spec import TrainSpec

Group = dict[str, Any]  # of an optimizer
Named = tuple[str, nn.Parameter]


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRates:
    """The rates of a recipe, and the parts of its model that they are for."""

    spec: TrainSpec
    family: Family

    def groups(self, model: nn.Module, decayed: Collection[str]) -> list[Group] | None:
        """Return the optimizer's groups; None where one rate is for all.

        Args:
            model: With what trains marked.
            decayed: Names of the parameters that `weight_decay` makes smaller.
        """
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if self.spec.loraplus_lr_ratio is not None and self.spec.finetuning_type == "lora":
            return self._lora_plus(model, trained)
        if self.spec.vision_lr is None and self.spec.projector_lr is None:
            return None
        return self._by_part(trained, decayed)

    def _lora_plus(self, model: nn.Module, trained: Iterable[Named]) -> list[Group]:
        rate, decay = self.spec.learning_rate, self.spec.weight_decay
        fast = rate * (self.spec.loraplus_lr_ratio or 1.0)
        decayed = {name for name in get_parameter_names(model, [nn.LayerNorm]) if "bias" not in name}
        groups = [
            {"params": [], "lr": rate, "weight_decay": decay},
            {"params": [], "lr": fast, "weight_decay": decay},
            {"params": [], "lr": fast, "weight_decay": 0.0},
        ]
        for name, parameter in trained:
            is_fast = "lora_B" in name or parameter.ndim == 1
            groups[0 if not is_fast else 1 if name in decayed else 2]["params"].append(parameter)
        return groups

    def _by_part(self, trained: Iterable[Named], decayed: Collection[str]) -> list[Group]:
        """The rest of the model comes first: its rate is the one that is logged."""
        spec, family = self.spec, self.family
        rates = (spec.learning_rate, spec.projector_lr, spec.vision_lr)
        groups = [
            {"params": [], "lr": spec.learning_rate if rate is None else rate, "weight_decay": decay}
            for rate in rates
            for decay in (spec.weight_decay, 0.0)
        ]
        for name, parameter in trained:
            part = 2 if _has(name, family.vision_keys) else 1 if _has(name, family.projector_keys) else 0
            groups[2 * part + (name not in decayed)]["params"].append(parameter)
        return groups


def _has(name: str, keys: tuple[str, ...]) -> bool:
    return any(key in name for key in keys)
