"""What trains: LLaMA-Factory's freezing rules, in the terms of the model's family.

A parameter trains if its name matches what the recipe asks for and matches nothing that is frozen; frozen wins.
Source: llamafactory 0.9.5, `model/adapter.py` and `model/model_utils/visual.py`.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import set_seed

from mllm_assets.errors import RecipeError, nearest
from mllm_assets.families.family import Family, family_of
from mllm_assets.recipe.method_keys import split_names
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.models import adapters, value_head
from mllm_assets.training.models.load import base_model
from mllm_assets.training.models.parts import with_parts
from mllm_assets.training.models.quantization import num_values

if TYPE_CHECKING:
    from peft import PeftConfig

FREEZING_KEYS = ("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")
FROZEN_BY = f"{FREEZING_KEYS[0]}, {FREEZING_KEYS[1]} or {FREEZING_KEYS[2]}"


@dataclass(kw_only=True, slots=True)
class TrainableSet:
    """The model ready to train, and what of it trains."""

    model: Any  # or the PEFT model around it
    family: Family
    names: list[str]  # trainable parameters, in the model's order
    table: list[dict[str, Any]]  # a row per module: `module`, `num_tensors`, `num_params`, `share` of all parameters
    num_trainable_params: int
    num_params: int
    warnings: list[str] = field(default_factory=list)  # what the recipe asks for that has no effect
    adapter_stands_alone: bool = True  # whether LoRA's adapter on the model that the run starts from is the trained one

    @property
    def tower_trains(self) -> bool:
        return any(key in name for name in self.names for key in self.family.vision_keys)


def apply(spec: TrainSpec, model: nn.Module, adapter_dirs: Sequence[Path] = ()) -> TrainableSet:
    """Freeze what the recipe freezes, add LoRA where it asks for it, and upcast what trains to float32.

    Trainable parameters stay in the model's own dtype with `pure_bf16`. `adapter_dirs` are those of
    `adapter_name_or_path`.

    Raises:
        RecipeError: A named module does not exist, or nothing trains.
    """
    family = model_family(model)
    num_params = sum(num_values(p) for p in model.parameters())
    notes: list[str] = []
    if spec.adds_adapters:
        merged = adapter_dirs[: len(adapter_dirs) - spec.continues_adapter]
        model = adapters.merge(model, merged, family)
        adds = not spec.continues_adapter
        model = _add_adapters(spec, model, notes) if adds else adapters.resume(model, adapter_dirs[-1])
        _keep_input_dtypes(spec, model)
    else:
        wanted = None if spec.finetuning_type == "full" else _wanted_by_freeze(spec, model, family, notes)
        frozen = _frozen_keys(spec, family)
        for name, parameter in model.named_parameters():
            is_wanted = wanted is None or any(key in name for key in wanted)
            parameter.requires_grad_(is_wanted and not any(key in name for key in frozen))
    if spec.learns_scores:
        value_head.attach(base_model(model))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if spec.changes_vocabulary and not any(p.requires_grad for p in embeddings(model)):
        notes.append(
            "the embeddings of new tokens do not train, so that they stay as they began. Set finetuning_type: lora or "
            "full, or freeze with freeze_extra_modules: embed_tokens."
        )
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
        adapter_stands_alone=len(adapter_dirs) == 1
        if spec.continues_adapter
        else not (adapter_dirs or spec.changes_vocabulary or (spec.pissa_init and spec.finetuning_type == "lora")),
    )


def _why_nothing_trains(spec: TrainSpec) -> str:
    if spec.finetuning_type == "freeze" and spec.freeze_trainable_layers == 0:
        return (
            "freeze_trainable_layers is 0, which trains no layer (2 is the last two of the language model, -2 the "
            "first two), and nothing else that the recipe asks for may train. Change it, or set "
            "freeze_multi_modal_projector: false to train only the projector."
        )
    frozen = ", ".join(key for key in FREEZING_KEYS if getattr(spec, key))
    return f"finetuning_type is {spec.finetuning_type}, and {frozen} freeze all of it. Set one of them to false."


def model_family(model: Any) -> Family:
    """Return the family of a model, with the names of its parts."""
    family = family_of(model.config.model_type)
    return family if family.is_described else with_parts(family, model)


def _frozen_keys(spec: TrainSpec, family: Family) -> tuple[str, ...]:
    keys: list[str] = []
    if spec.freeze_vision_tower:
        keys.extend(family.vision_keys)
    if spec.freeze_multi_modal_projector:
        keys.extend(family.projector_keys)
    if spec.freeze_language_model:
        keys.extend(family.language_keys)
    return tuple(keys)


def _wanted_by_freeze(spec: TrainSpec, model: nn.Module, family: Family, notes: list[str]) -> tuple[str, ...]:
    """Return the name fragments that `finetuning_type: freeze` trains, frozen parts included.

    Layer numbers count the text layers, but a fragment such as `.32.` matches the tower's layer of that number too:
    only `freeze_vision_tower` keeps that one frozen. LLaMA-Factory does the same.
    """
    num_layers: int = model.config.get_text_config().num_hidden_layers  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    count = spec.freeze_trainable_layers
    layers = range(max(0, num_layers - count), num_layers) if count > 0 else range(min(-count, num_layers))
    names = [name for name, _ in model.named_parameters()]
    in_layers = {name.split(".0.")[-1].split(".")[0] for name in names if ".0." in name}
    outside = {name.split(".")[-2] for name in names if re.search(r"\.\d+\.", name) is None}

    wanted: list[str] = []
    frozen = _frozen_keys(spec, family)

    def want(key: str, module: str, fragments: list[str], known: set[str]) -> None:
        if module not in known:
            raise _unknown_modules(key, [module], known)
        wanted.extend(fragments)
        matched = [name for name in names if any(fragment in name for fragment in fragments)]
        if module != "all" and all(any(part in name for part in frozen) for name in matched):
            why = "none of the chosen layers has it."
            if matched:
                why = f"its {len(matched)} parameters ({matched[0]} ...) are frozen by {FROZEN_BY}."
            notes.append(f"{key} names {module}, but it trains nothing: {why}")

    for module in split_names(spec.freeze_trainable_modules):
        fragments = [f".{index}.{'' if module == 'all' else module}" for index in layers]
        want("freeze_trainable_modules", module, fragments, in_layers | {"all"})
    for module in split_names(spec.freeze_extra_modules):
        want("freeze_extra_modules", module, [module], outside)
    if not spec.freeze_multi_modal_projector:
        wanted.extend(family.projector_keys)
    return tuple(wanted)


def _unknown_modules(key: str, modules: list[str], known: set[str]) -> RecipeError:
    hints = [near[0] for module in modules if (near := nearest(module, known))]
    hint = f"Did you mean {' and '.join(hints)}?" if hints else f"Choose from: {', '.join(sorted(known))}."
    return RecipeError(f"{key} names {', '.join(map(repr, modules))}, which the model does not have. {hint}")


def _add_adapters(spec: TrainSpec, model: nn.Module, notes: list[str]) -> nn.Module:
    from peft import get_peft_model

    layers = lora_targets(spec, model)
    for target in split_names(spec.lora_target):
        if target != "all" and not any(target in name for name in layers):
            notes.append(
                f"lora_target names {target}, but it trains nothing: its layers are frozen by "
                f"{FROZEN_BY}, or take no adapter, as lm_head."
            )
    takes_from_base = spec.pissa_init and spec.finetuning_type == "lora"
    if takes_from_base:
        notes.append(
            "pissa_init takes the adapters out of the base's weights, so that they fit only what is left of it: the "
            "merged model/ is published, and no adapter/."
        )
    config = _oft(spec, layers, model) if spec.finetuning_type == "oft" else _lora(spec, layers, model)
    if takes_from_base:
        set_seed(spec.seed)  # part of what stays frozen follows from its draws, wherever the model is loaded again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 reads a name that transformers 5.23 deprecates
        adapted: Any = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    if trained := embeddings_beside_adapters(spec, model):
        notes.append(
            "new tokens are learnt with the embeddings, which train as they are, and not as a copy that an adapter "
            "holds: the merged model/ is published, and no adapter/."
        )
    for weight in trained:
        weight.requires_grad_(True)
    return adapted


def embeddings(model: Any) -> list[nn.Parameter]:
    """The weights of a model's input and output embeddings, which may be one."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return list(dict.fromkeys(layer.weight for layer in layers if layer is not None))


def embeddings_beside_adapters(spec: TrainSpec, model: nn.Module) -> list[nn.Parameter]:
    """The embeddings that new tokens need: those that `additional_target` names, or both where it names nothing.

    They train in place, where LLaMA-Factory trains copies, so that one which is input and output stays one.
    """
    if not spec.changes_vocabulary:
        return []
    named = split_names(spec.additional_target)
    modules = [m for name, m in model.named_modules() if not named or any(name.endswith(target) for target in named)]
    owned = {id(p) for module in modules for p in module.parameters(recurse=False)}
    return [weight for weight in embeddings(model) if id(weight) in owned]


def _oft(spec: TrainSpec, layers: list[str], model: nn.Module) -> "PeftConfig":
    from peft import OFTConfig, TaskType

    return OFTConfig(
        task_type=TaskType.CAUSAL_LM,
        inference_mode=False,
        r=spec.oft_rank,
        oft_block_size=spec.oft_block_size,
        target_modules=layers,
        module_dropout=spec.module_dropout,
        modules_to_save=additional_targets(spec, model),
    )


def _lora(spec: TrainSpec, layers: list[str], model: nn.Module) -> "PeftConfig":
    from peft import LoraConfig, TaskType

    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        inference_mode=False,
        r=spec.lora_rank,
        target_modules=layers,
        lora_alpha=spec.lora_alpha or 2 * spec.lora_rank,
        lora_dropout=spec.lora_dropout,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        modules_to_save=additional_targets(spec, model),
        init_lora_weights=_initial_weights(spec, model),
    )


def _keep_input_dtypes(spec: TrainSpec, adapted: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if spec.bf16 or spec.fp16:  # autocast rounds again what PEFT makes float32 of, and the copy is kept for backward
        tuners: list[Any] = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
        for tuner in tuners:
            tuner.cast_input_dtype_enabled = False


def _initial_weights(spec: TrainSpec, model: nn.Module) -> Any:
    """PEFT's name for how adapters begin; a shape on `meta` has nothing to decompose."""
    if not spec.pissa_init or next(model.parameters()).is_meta:
        return True
    return "pissa" if spec.pissa_iter == -1 else f"pissa_niter_{spec.pissa_iter}"


def additional_targets(spec: TrainSpec, model: nn.Module) -> list[str] | None:
    """Return the modules that train whole next to LoRA, by the ends of their names, as PEFT takes them.

    Raises:
        RecipeError: There is no such module, or it cannot train so. Names what to write instead.
    """
    targets = list(split_names(spec.additional_target))
    modules = dict(model.named_modules())
    if unknown := [t for t in targets if not any(name.endswith(t) for name in modules if name)]:
        known = {name.split(".")[-1] for name, module in modules.items() if any(True for _ in module.parameters())}
        raise _unknown_modules("additional_target", unknown, {name for name in known if name and not name.isdigit()})
    family = model_family(model)
    wrapped = []
    for target in targets:
        names = [name for name in modules if name.endswith(target)]
        if spec.freeze_vision_tower and any(key in name for name in names for key in family.vision_keys):
            raise RecipeError(
                f"additional_target names {target}, which is part of the vision tower, and freeze_vision_tower is "
                "true. Set freeze_vision_tower: false, or name another module."
            )
        outer: Any = model
        tied = {outer.get_input_embeddings(), outer.get_output_embeddings()}
        if spec.changes_vocabulary and all(modules[name] in tied for name in names):
            continue  # it trains in place, see `embeddings_beside_adapters`
        if outer.config.get_text_config().tie_word_embeddings and any(modules[name] in tied for name in names):
            raise RecipeError(
                f"additional_target names {target}, whose weights the model's input and output share; PEFT would train "
                "a copy for one of the two. Use finetuning_type: freeze with freeze_extra_modules: embed_tokens."
            )
        wrapped.append(target)
    return wrapped or None


def lora_targets(spec: TrainSpec, model: nn.Module) -> list[str]:
    """Return full module names: `all` means linears, of the tower only where it is not frozen, never the projector.

    Raises:
        RecipeError: A name in `lora_target` matches no linear layer, or no name one that may train.
    """
    family, targets = model_family(model), split_names(spec.lora_target)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if unknown := [t for t in targets if targets != ("all",) and not any(t in name for name in linears)]:
        raise _unknown_modules("lora_target", unknown, {"all", *(name.split(".")[-1] for name in linears)})
    if targets == ("all",):
        forbidden = {"lm_head", *family.projector_keys, *(family.vision_keys if spec.freeze_vision_tower else ())}
        targets = {name.split(".")[-1] for name in linears if not any(key in name for key in forbidden)}
    frozen = (*_frozen_keys(spec, family), *family.lora_conflict_keys)
    names = [
        name
        for name in linears
        if any(target in name for target in targets)
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
