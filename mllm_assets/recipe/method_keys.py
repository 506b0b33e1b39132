"""`MethodKeys`: which part of a model trains, what LoRA starts from, and how fast each part learns.

They are a part of `TrainSpec`, with LLaMA-Factory's names and defaults (0.9.5, `hparams/finetuning_args.py`);
`vision_lr` and `projector_lr` are those of 2U1's trainers, which LLaMA-Factory has not.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

# What a field is for. "semantic" fields decide which weights come out and are hashed into the run's name;
# "selection" fields do so only where evaluation picks the best model, stops the run or steers the learning rate;
# "operational" fields never do. `hf`: transformers' TrainingArguments has a field of that name. `added`: finished runs
# are older than the key, so that it is in a name only where it is not the default.
SEMANTIC = {"scope": "semantic", "hf": False}
OPERATIONAL = {"scope": "operational", "hf": False}
HF_SEMANTIC = {"scope": "semantic", "hf": True}
HF_SELECTION = {"scope": "selection", "hf": True}
HF_OPERATIONAL = {"scope": "operational", "hf": True}
ADDED = {"scope": "semantic", "hf": False, "added": True}
HF_ADDED = {"scope": "semantic", "hf": True, "added": True}
ADAPTER_KEYS = ("lora_target", "additional_target")  # of OFT as well
LORA_KEYS = (
    "lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "pissa_init", "pissa_iter",
    "loraplus_lr_ratio",
)  # fmt: skip
OFT_KEYS = ("oft_rank", "oft_block_size", "module_dropout")


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodKeys:
    """What trains. Comma lists stay strings, as LLaMA-Factory writes them; read them with `split_names`."""

    finetuning_type: Literal["lora", "oft", "freeze", "full"] = field(default="lora", metadata=SEMANTIC)
    freeze_vision_tower: bool = field(default=True, metadata=SEMANTIC)
    freeze_multi_modal_projector: bool = field(default=True, metadata=SEMANTIC)
    freeze_language_model: bool = field(default=False, metadata=SEMANTIC)
    freeze_trainable_layers: int = field(default=2, metadata=SEMANTIC)
    freeze_trainable_modules: str = field(default="all", metadata=SEMANTIC)
    freeze_extra_modules: str | None = field(default=None, metadata=SEMANTIC)
    lora_rank: int = field(default=8, metadata=SEMANTIC)
    lora_alpha: int | None = field(default=None, metadata=SEMANTIC)  # becomes 2 * lora_rank
    lora_dropout: float = field(default=0.0, metadata=SEMANTIC)
    lora_target: str = field(default="all", metadata=SEMANTIC)
    use_rslora: bool = field(default=False, metadata=SEMANTIC)
    use_dora: bool = field(default=False, metadata=SEMANTIC)
    additional_target: str | None = field(default=None, metadata=ADDED)
    pissa_init: bool = field(default=False, metadata=ADDED)
    pissa_iter: int = field(default=16, metadata=ADDED)  # -1: the exact decomposition
    loraplus_lr_ratio: float | None = field(default=None, metadata=ADDED)
    oft_rank: int = field(default=0, metadata=ADDED)  # blocks of a layer, where their size is 0
    oft_block_size: int = field(default=32, metadata=ADDED)
    module_dropout: float = field(default=0.0, metadata=ADDED)
    adapter_name_or_path: str | None = field(default=None, metadata=OPERATIONAL)  # their content is hashed
    create_new_adapter: bool = field(default=False, metadata=ADDED)
    use_muon: bool = field(default=False, metadata=ADDED)
    vision_lr: float | None = field(default=None, metadata=ADDED)
    projector_lr: float | None = field(default=None, metadata=ADDED)
    quantization_bit: Literal[4, 8] | None = field(default=None, metadata=SEMANTIC)
    quantization_type: Literal["nf4", "fp4"] = field(default="nf4", metadata=SEMANTIC)
    double_quantization: bool = field(default=True, metadata=SEMANTIC)

    @property
    def adds_adapters(self) -> bool:
        """Whether what trains is put beside the model's own layers, and merged into them in the end."""
        return self.finetuning_type in ("lora", "oft")

    @property
    def adapters(self) -> tuple[str, ...]:
        """Adapters to start from, in the order in which they were trained."""
        return split_names(self.adapter_name_or_path)

    @property
    def continues_adapter(self) -> bool:
        """Whether the last adapter trains on, instead of being merged as those before it."""
        return bool(self.adapters) and not self.create_new_adapter

    @property
    def idle_method_keys(self) -> dict[str, str]:
        """The keys that the others leave without effect, each with the reason."""
        idle = {}
        if self.finetuning_type != "lora":
            idle |= dict.fromkeys(LORA_KEYS, f"finetuning_type is {self.finetuning_type}, not lora")
        if self.finetuning_type != "oft":
            idle |= dict.fromkeys(OFT_KEYS, f"finetuning_type is {self.finetuning_type}, not oft")
        if not self.adds_adapters:
            idle |= dict.fromkeys(ADAPTER_KEYS, f"finetuning_type is {self.finetuning_type}, neither lora nor oft")
        if self.finetuning_type != "freeze":
            keys = ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")
            idle |= dict.fromkeys(keys, f"finetuning_type is {self.finetuning_type}, not freeze")
        if self.finetuning_type == "lora" and self.continues_adapter:
            keys = (*ADAPTER_KEYS, *LORA_KEYS[: LORA_KEYS.index("loraplus_lr_ratio")])
            idle |= dict.fromkeys(keys, "adapter_name_or_path continues an adapter, which keeps its own")
        if not self.adapters:
            idle["create_new_adapter"] = "there is no adapter_name_or_path"
        if not self.pissa_init:
            idle.setdefault("pissa_iter", "pissa_init is not set")
        if self.quantization_bit != 4:
            why = "quantization_bit is not set, so nothing is quantised"
            if self.quantization_bit is not None:
                why = f"quantization_bit is {self.quantization_bit}, and only 4 bits have kinds"
            idle |= dict.fromkeys(("quantization_type", "double_quantization"), why)
        return idle


def split_names(text: str | None) -> tuple[str, ...]:
    """Split LLaMA-Factory's comma lists: `"a, b"` is `("a", "b")`, None and `""` are `()`."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def method_problems(spec: MethodKeys) -> Iterator[tuple[str, str]]:
    """Yield each key that is wrong, or does not go with another, and a sentence about it."""
    for key in ("lora_rank", "loraplus_lr_ratio", "vision_lr", "projector_lr"):
        value = getattr(spec, key)
        if value is not None and value <= 0:
            yield key, f"{key} is {value}: expected a number above 0. Change it or delete the line."
    for key in ("loraplus_lr_ratio", "vision_lr", "projector_lr"):
        if spec.use_muon and getattr(spec, key):
            yield "use_muon", f"use_muon has one learning rate, and {key} is set. Delete one of the two."
    for key in ("lora_dropout", "module_dropout"):
        if not 0 <= (value := getattr(spec, key)) < 1:
            yield key, f"{key} is {value}: expected 0 or more and below 1. Change it."
    if spec.finetuning_type == "oft" and (
        min(spec.oft_rank, spec.oft_block_size) or spec.oft_rank + spec.oft_block_size < 1
    ):
        text = f"oft_rank is {spec.oft_rank} and oft_block_size {spec.oft_block_size}: each follows from the other."
        yield "oft_rank", f"{text} Set one of the two to 0 and the other above it."
    if spec.pissa_iter != -1 and spec.pissa_iter < 1:
        text = f"pissa_iter is {spec.pissa_iter}: expected a number of iterations, or -1 for the exact decomposition."
        yield "pissa_iter", f"{text} Change it."
    if spec.quantization_bit and spec.finetuning_type != "lora":
        text = f"quantization_bit leaves only adapters to train, and finetuning_type is {spec.finetuning_type}. "
        yield "quantization_bit", f"{text}Set finetuning_type: lora, or delete quantization_bit."
    if spec.adapters and spec.finetuning_type != "lora":
        text = (
            f"adapter_name_or_path is for LoRA, and finetuning_type is {spec.finetuning_type}. Set it to lora, or name "
        )
        yield "adapter_name_or_path", f"{text}the merged model of the adapter's run in model_name_or_path."
    if spec.finetuning_type != "lora":
        return
    if spec.quantization_bit and len(spec.adapters) > spec.continues_adapter:
        text = "quantization_bit holds the base in few bits, into which no adapter is merged. Merge them first, and "
        yield "adapter_name_or_path", f"{text}name the merged model in model_name_or_path."
    if spec.pissa_init and spec.quantization_bit:
        text = "pissa_init takes the adapters out of the base's weights, and quantization_bit holds those in few bits."
        yield "pissa_init", f"{text} Keep one of the two."
    if spec.pissa_init and spec.use_dora:
        text = "pissa_init and use_dora both change what an adapter is to its base. Keep one of the two."
        yield "pissa_init", text
    if spec.additional_target and spec.quantization_bit:
        text = "additional_target trains whole modules, and quantization_bit holds linear layers in few bits."
        yield "additional_target", f"{text} Delete one of the two."
    if spec.loraplus_lr_ratio and (spec.vision_lr or spec.projector_lr):
        text = "loraplus_lr_ratio gives LoRA's two matrices a learning rate each, and vision_lr and projector_lr parts"
        yield "loraplus_lr_ratio", f"{text} of the model. Keep one kind."
