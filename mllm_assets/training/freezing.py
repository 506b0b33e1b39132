"""What trains: LLaMA-Factory's freezing rules, as it reads them, in the terms of the model's family.

A parameter trains if its name matches what the recipe asks for and matches nothing that is frozen; frozen wins.
Source: llamafactory 0.9.5, `model/adapter.py` and `model/model_utils/visual.py`.
"""

import difflib
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mllm_assets.errors import RecipeError
from mllm_assets.training.families import FAMILIES, Family
from mllm_assets.training.quantization import num_values
from mllm_assets.training.spec import TrainSpec
from mllm_assets.training.spec_rules import split_names


@dataclass(kw_only=True, slots=True)
class TrainableSet:
    """The model ready to train, and what of it trains.

    Attributes:
        model: The model, or the PEFT model around it.
        family: The model's family.
        names: Trainable parameters, in the model's order.
        table: A row per module: `module`, `num_tensors`, `num_params`, `share` of all parameters.
        warnings: What the recipe asks for that has no effect.
    """

    model: Any
    family: Family
    names: list[str]
    table: list[dict[str, Any]]
    num_trainable_params: int
    num_params: int
    warnings: list[str] = field(default_factory=list)

    @property
    def tower_trains(self) -> bool:
        return any(key in name for name in self.names for key in self.family.vision_keys)


def apply(spec: TrainSpec, model: nn.Module) -> TrainableSet:
    """Freeze what the recipe freezes, add LoRA where it asks for it, and upcast what trains to float32.

    Trainable parameters stay in the model's own dtype with `pure_bf16`.

    Raises:
        RecipeError: A named module does not exist, or nothing trains.
    """
    family = model_family(model)
    num_params = sum(num_values(p) for p in model.parameters())
    notes: list[str] = []
    if spec.finetuning_type == "lora":
        model = _add_lora(spec, model)
    else:
        wanted = None if spec.finetuning_type == "full" else _wanted_by_freeze(spec, model, family, notes)
        frozen = _frozen_keys(spec, family)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_matches(name, wanted) and not any(key in name for key in frozen))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise RecipeError(f"Nothing trains: {_why_nothing_trains(spec)}")
    if not spec.pure_bf16:
        for _, parameter in trainable:
            parameter.data = parameter.data.to(torch.float32)
    return TrainableSet(
        model=model,
        family=family,
        names=[name for name, _ in trainable],
        table=_table(trainable, num_params),
        num_trainable_params=sum(p.numel() for _, p in trainable),
        num_params=num_params,
        warnings=notes,
    )


def _why_nothing_trains(spec: TrainSpec) -> str:
    if spec.finetuning_type == "freeze" and spec.freeze_trainable_layers == 0:
        return (
            "freeze_trainable_layers is 0, which is no layer at all (2 is the last two of the language model, -2 the "
            "first two), and nothing else that the recipe asks for may train. Change it, or set "
            "freeze_multi_modal_projector: false to train the projector alone."
        )
    keys = ("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")
    frozen = ", ".join(key for key in keys if getattr(spec, key))
    return f"finetuning_type is {spec.finetuning_type}, and {frozen} freeze all of it. Set one of them to false."


def model_family(model: Any) -> Family:
    """Return the family of a model of a known type."""
    return FAMILIES[model.config.model_type]


def _frozen_keys(spec: TrainSpec, family: Family) -> tuple[str, ...]:
    keys: list[str] = []
    if spec.freeze_vision_tower:
        keys.extend(family.vision_keys)
    if spec.freeze_multi_modal_projector:
        keys.extend(family.projector_keys)
    if spec.freeze_language_model:
        keys.extend(family.language_keys)
    return tuple(keys)


def _matches(name: str, wanted: tuple[str, ...] | None) -> bool:
    return wanted is None or any(key in name for key in wanted)


def _wanted_by_freeze(spec: TrainSpec, model: nn.Module, family: Family, notes: list[str]) -> tuple[str, ...]:
    """Return the name fragments that `finetuning_type: freeze` trains, frozen parts not yet taken out.

    Layer numbers count the text layers, but a fragment such as `.32.` matches the tower's layer of that number too:
    only `freeze_vision_tower` keeps that one frozen. LLaMA-Factory does the same.
    """
    num_layers: int = model.config.get_text_config().num_hidden_layers  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    count = spec.freeze_trainable_layers
    layers = range(max(0, num_layers - count), num_layers) if count > 0 else range(min(-count, num_layers))
    names = [name for name, _ in model.named_parameters()]
    in_layers = {name.split(".0.")[-1].split(".")[0] for name in names if ".0." in name}
    outside = {name.split(".")[-2] for name in names if re.search(r"\.\d+\.", name) is None}

    wanted = []
    for module in split_names(spec.freeze_trainable_modules):
        if module != "all" and module not in in_layers:
            raise _unknown_module("freeze_trainable_modules", module, in_layers | {"all"})
        wanted += [f".{index}.{'' if module == 'all' else module}" for index in layers]
    frozen = _frozen_keys(spec, family)
    for module in split_names(spec.freeze_extra_modules):
        if module not in outside:
            raise _unknown_module("freeze_extra_modules", module, outside)
        wanted.append(module)
        matched = [name for name in names if module in name]
        if all(any(key in name for key in frozen) for name in matched):
            notes.append(
                f"freeze_extra_modules names {module}, but it trains nothing: its {len(matched)} parameters "
                f"({matched[0]} ...) are frozen by freeze_vision_tower, freeze_multi_modal_projector or "
                f"freeze_language_model."
            )
    if not spec.freeze_multi_modal_projector:
        wanted.extend(family.projector_keys)
    return tuple(wanted)


def _unknown_module(key: str, module: str, known: set[str]) -> RecipeError:
    near = difflib.get_close_matches(module, sorted(known), n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Choose from: {', '.join(sorted(known))}."
    return RecipeError(f"{key} names {module!r}, which the model does not have. {hint}")


def _add_lora(spec: TrainSpec, model: nn.Module) -> nn.Module:
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        inference_mode=False,
        r=spec.lora_rank,
        target_modules=lora_targets(spec, model),
        lora_alpha=spec.lora_alpha or 2 * spec.lora_rank,
        lora_dropout=spec.lora_dropout,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 reads a name that transformers 5.23 deprecates
        return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


def lora_targets(spec: TrainSpec, model: nn.Module) -> list[str]:
    """Return full module names: `all` means linears, of the tower only where it is not frozen, never the projector.

    Raises:
        RecipeError: Nothing matches `lora_target`.
    """
    family, targets = model_family(model), split_names(spec.lora_target)
    if targets == ("all",):
        forbidden = {"lm_head", *family.projector_keys, *(family.vision_keys if spec.freeze_vision_tower else ())}
        targets = tuple(
            sorted(
                {
                    name.split(".")[-1]
                    for name, module in model.named_modules()
                    if isinstance(module, nn.Linear) and not any(key in name for key in forbidden)
                }
            )
        )
    frozen = (*_frozen_keys(spec, family), *family.lora_conflict_keys)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(target in name for target in targets)
        and not any(key in name for key in frozen)
        and not name.endswith("lm_head")
    ]
    if not names:
        raise RecipeError(
            f"lora_target {spec.lora_target!r} matches no linear layer outside what is frozen. "
            f"Set lora_target: all, or name layers such as q_proj,v_proj."
        )
    return names


def _table(trainable: list[tuple[str, nn.Parameter]], num_params: int) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for name, parameter in trainable:
        module = _module_of(name)
        row = rows.setdefault(module, {"module": module, "num_tensors": 0, "num_params": 0, "share": 0.0})
        row["num_tensors"] += 1
        row["num_params"] += parameter.numel()
    for row in rows.values():
        row["share"] = row["num_params"] / num_params
    return list(rows.values())


def _module_of(name: str) -> str:
    """`model.language_model.layers.2.mlp.up_proj.weight` belongs to `language_model.layers.2`."""
    name = name.removeprefix("base_model.model.").removeprefix("model.")
    layer = re.match(r"(.*?\.layers\.\d+)\.", name)
    if layer:
        return layer[1]
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "language_model" else parts[0]
