"""A training step on fake tensors: the memory that it takes on a GPU, without one and before a weight is loaded.

A fake tensor has a shape, a dtype and no content. The model's own `forward` and PyTorch's own backward pass run over
them under CUDA's rules: what autocast computes in float32, what CUDA's attention kernels keep, what a checkpointed
layer drops. So nothing has to be counted by hand, whatever trains and however wide it is.

Shape suffixes: B rows, T tokens, S supervised positions.
Not covered: families whose `forward` reads values of its inputs, as Qwen's grids of patches; sharded weights.
"""

import contextlib
import copy
import json
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mllm_assets.artifacts import digest_json, sha256_file, write_json_atomic
from mllm_assets.plugins import resolve
from mllm_assets.training.caches.prepare import CachePlan, Setup, install_caches
from mllm_assets.training.loop import loss
from mllm_assets.training.loop.optimizers import TEMPORARY, embeddings, kept_states, optimizer_name
from mllm_assets.training.models import freezing
from mllm_assets.training.models.load import base_model, model_on_meta, without_waiting_checks
from mllm_assets.training.models.quantization import Quantization, quantized_weights

ALLOCATION_BYTES = 512  # CUDA's caching allocator rounds up to them


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedStep:
    """Bytes of one step: what is there all the time, and the most that there is at once."""

    weights: int
    gradients: int
    optimizer: int
    highest: int


# Of a recipe, what changes nothing of the memory of a step beside what is counted of rows and of what trains
_NOT_OF_A_STEP = {
    "data_seed", "dataset", "eval_dataset", "eval_steps", "learning_rate", "logging_steps", "max_samples", "max_steps",
    "model_name_or_path", "num_train_epochs", "output_dir", "save_steps", "seed", "val_size", "weight_decay",
}  # fmt: skip
_KNOWN: dict[str, SimulatedStep] = {}


def simulate(setup: Setup, plan: CachePlan, *, checkpointed: bool) -> SimulatedStep:
    """Run the second step of a training, the first one with an optimizer state, on fake tensors.

    It takes seconds for a model of many layers, and is done once for each size of a micro-batch: where
    `setup.caches.estimates_root` is, other processes read what one found.
    """
    # two micro-batches of a step take what many take
    spec = replace(setup.spec, gradient_accumulation_steps=min(2, setup.spec.gradient_accumulation_steps))
    size = _BatchSize.of(setup)
    config = base_model(setup.shape.model).config
    recipe = {key: value for key, value in spec.to_dict().items() if key not in _NOT_OF_A_STEP}
    facts = [config.to_dict(), recipe, setup.precision.describe(), asdict(size), plan.tower, plan.boundary]
    key = digest_json([*facts, checkpointed, setup.shape.table, _made_by()])
    if key not in _KNOWN:
        root = setup.caches.estimates_root
        kept = root / f"{key[:16]}.json" if root else None
        found = _read(kept) if kept else None
        if found is None:
            found = _run(replace(setup, spec=spec), plan, size, checkpointed=checkpointed)
            if kept:
                write_json_atomic(kept, asdict(found))
        _KNOWN[key] = found
    return _KNOWN[key]


@cache
def _made_by() -> list[str]:
    """Of the code that a step runs: another one may take other memory."""
    rooms = Path(__file__).parents[1]
    own = sorted(path for room in ("loop", "models", "caches") for path in (rooms / room).glob("*.py"))
    libraries = [version(name) for name in ("torch", "transformers", "peft", "accelerate")]
    return [*libraries, digest_json([sha256_file(path) for path in own])]


def _read(path: Path) -> SimulatedStep | None:
    """What another process found; None where it is not there, or damaged."""
    try:
        values = json.loads(path.read_bytes())
        step = SimulatedStep(**values)
    except (OSError, ValueError, TypeError):
        return None
    is_sound = all(type(value) is int and value >= 0 for value in values.values())
    return step if is_sound and step.highest >= step.weights + step.gradients + step.optimizer else None


@dataclass(frozen=True, kw_only=True, slots=True)
class _BatchSize:
    """The largest batch of a run, each row like the longest."""

    num_rows: int
    num_tokens: int
    num_supervised: int  # tokens of a row
    num_images: int  # of a row
    num_image_tokens: int  # of a row

    @classmethod
    def of(cls, setup: Setup) -> "_BatchSize":
        rows, spec = setup.inputs.rows, setup.spec
        num_drawn = spec.max_completion_length if spec.learns_rewards else 0
        return cls(
            num_rows=spec.per_device_train_batch_size * spec.sequences_of_a_row,
            num_tokens=-(-(int(rows.counted("num_tokens").max()) + num_drawn) // 8) * 8,
            num_supervised=num_drawn or int(rows.counted("num_supervised").max()),
            num_images=int((rows.counted("images") + rows.counted("num_crops")).max()),
            num_image_tokens=int(rows.counted("num_image_tokens").max()),
        )


def _run(setup: Setup, plan: CachePlan, size: _BatchSize, *, checkpointed: bool) -> SimulatedStep:
    spec, precision = setup.spec, setup.precision
    config = copy.deepcopy(base_model(setup.shape.model).config)
    on_meta = model_on_meta(config, dtype=precision.weights, attention=precision.attention)
    trainable = freezing.apply(spec, on_meta, setup.adapters)
    model, core = trainable.model, base_model(trainable.model)
    core.config.text_config.use_cache = False
    quantized = quantized_weights(core) if precision.quantization else set()
    install_caches(core, plan)
    is_frozen_head = loss.install(
        core, label_smoothing=spec.label_smoothing_factor, keeps_head=bool(spec.fsdp or spec.deepspeed)
    )
    if checkpointed:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    with cuda_rules():
        if precision.quantization is not None:
            _quantize(model, quantized, precision.quantization, precision.weights)
        to_fake(model)
        if is_frozen_head:
            core._frozen_head[0].weight = core.get_input_embeddings().weight
        memory = LiveBytes()
        memory.add([*model.parameters(), *model.buffers()])
        weights = memory.now
        trained = [p for p in model.parameters() if p.requires_grad]
        embedded = embeddings(model)
        name = optimizer_name(spec)
        states = [kept for p in trained for kept in kept_states(name, p, is_embedding=id(p) in embedded)]
        memory.add(states)
        optimizer = memory.now - weights
        gradients = sum(p.numel() * p.element_size() for p in trained)
        if spec.gradient_accumulation_steps > 1:  # those of the micro-batches before
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            memory.add([p.grad for p in trained])
        batch = _batch(setup, plan, size, config)
        memory.add(batch)
        block = {"cpu": loss.LOSS_BLOCK}  # a GPU's
        with memory, patched(loss, "BLOCK", block):
            with setup.precision.context("cpu"), without_waiting_checks():
                found = model(**batch).loss
            found.backward()
        temporary = gradients * TEMPORARY.get(name, 0)
        highest = max(memory.highest, weights + optimizer + gradients + temporary)
    return SimulatedStep(weights=weights, gradients=gradients, optimizer=optimizer, highest=highest)


def _batch(setup: Setup, plan: CachePlan, size: _BatchSize, config: Any) -> dict[str, Any]:
    family, spec = setup.shape.family, setup.spec
    ids_BT = torch.zeros((size.num_rows, size.num_tokens), dtype=torch.long)
    places_BS = torch.zeros((size.num_rows, size.num_supervised), dtype=torch.long)
    batch: dict[str, Any] = {
        "input_ids": ids_BT,
        "labels": torch.zeros_like(ids_BT),
        "attention_mask": torch.zeros_like(ids_BT),
        "logits_to_keep": places_BS,
        "shift_labels": torch.zeros_like(places_BS),
    }
    if family.token_types is not None:
        batch[family.token_types[0]] = torch.zeros_like(ids_BT)
    if spec.packs:
        batch["position_ids"] = torch.zeros_like(ids_BT)
    if spec.neat_packing:
        batch["attention_mask"] = resolve(str(family.packed_masks))(batch, config.text_config)
    if plan.boundary is not None:
        states = torch.empty(*ids_BT.shape, config.text_config.hidden_size, dtype=setup.precision.computed)
        return {name: value for name, value in batch.items() if name != "input_ids"} | {"inputs_embeds": states}
    if size.num_images and plan.tower:
        shape = (size.num_rows * size.num_image_tokens, config.vision_config.hidden_size)
        batch["pixel_values"] = torch.empty(shape, dtype=setup.precision.computed)
    elif size.num_images:
        side = config.vision_config.image_size
        batch["pixel_values"] = torch.empty(size.num_rows * size.num_images, 3, side, side)
    return batch


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that live, and the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.highest = 0
        self._live: set[int] = set()

    def add(self, values: Any) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._add(tensor.untyped_storage())

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._live:
            return
        num_bytes = -(-storage.nbytes() // ALLOCATION_BYTES) * ALLOCATION_BYTES
        self._live.add(key)
        self.now += num_bytes
        self.highest = max(self.highest, self.now)
        weakref.finalize(storage, self._drop, key, num_bytes)

    def _drop(self, key: int, num_bytes: int) -> None:
        self._live.discard(key)
        self.now -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.add(made)
        return made


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def cuda_rules() -> Iterator[None]:
    """Fake tensors on the CPU, with CUDA's attention kernels and its autocast of layer norms."""
    functional = torch.nn.functional
    with (
        patched(functional, "scaled_dot_product_attention", _attention),
        patched(functional, "layer_norm", _layer_norm),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """CUDA's kernels: flash without a mask, memory-efficient with one, whose booleans become a bias."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if attn_mask is None and query.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    bias = attn_mask
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            zeros = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
            attn_mask = zeros.masked_fill_(~attn_mask, float("-inf"))
        bias = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    keeps_sums = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, keeps_sums, dropout_p, is_causal, scale=scale)[0]


_plain_layer_norm = torch.nn.functional.layer_norm


def _layer_norm(
    values: torch.Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> torch.Tensor:
    """In float32 under autocast, which the CPU's autocast does not do."""
    if not torch.is_autocast_enabled("cpu"):
        return _plain_layer_norm(values, shape, weight, bias, eps)
    with torch.autocast("cpu", enabled=False):
        weight, bias = (None if tensor is None else tensor.float() for tensor in (weight, bias))
        return _plain_layer_norm(values.float(), shape, weight, bias, eps)


def to_fake(model: nn.Module) -> None:
    """Replace tensors on `meta` by fake ones; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) not in made:
                like = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = nn.Parameter(like, requires_grad=parameter.requires_grad)
            if parameter is not None:
                module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _quantize(model: nn.Module, quantized: set[int], quantization: Quantization, dtype: torch.dtype) -> None:
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and id(child.weight) in quantized:
                setattr(module, name, _QuantizedLinear(child, quantization, dtype))


class _QuantizedLinear(nn.Module):
    """A linear layer of bitsandbytes by its memory: its weight is unpacked for a moment, forward and backward."""

    def __init__(self, plain: nn.Linear, quantization: Quantization, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype, self.keeps_input = tuple(plain.weight.shape), dtype, quantization.bits == 8
        self.in_features, self.out_features = plain.in_features, plain.out_features
        packed = torch.empty(int(quantization.weight_bytes(plain.weight)), dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = plain.bias

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        made = _Unpacked.apply(values.to(self.dtype), self.shape, self.keeps_input)
        return made if self.bias is None else made + self.bias.to(self.dtype)  # pyright: ignore[reportOperatorIssue, reportReturnType]


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, shape: tuple[int, int], keeps_input: bool) -> torch.Tensor:
        ctx.shape = shape
        if keeps_input and ctx.needs_input_grad[0]:
            ctx.values = values  # as 8 bits do: out of reach of what computes activations twice
        return values @ values.new_empty(shape).T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] @ grads[0].new_empty(ctx.shape), None, None
