"""What a training step holds in memory, by doing it: a whole step on fake tensors, optimizer included.

Apart from `training.loop.simulation`, which a run asks: here micro-batches follow one another, gradients are clipped,
the optimizer is PyTorch's own, and quantised layers are bitsandbytes' own functions.
"""

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mllm_assets.training.caches import tower
from mllm_assets.training.caches.prepare import Setup
from mllm_assets.training.loop import loss
from mllm_assets.training.loop.simulation import patched
from mllm_assets.training.models.load import base_model, without_waiting_checks
from mllm_assets.training.models.quantization import quantized_weights
from tests.fake_cuda import Peak, cuda_sdpa, to_fake

plain_layer_norm = torch.nn.functional.layer_norm


def whole_step_bytes(setup: Setup, *, num_tokens: int, num_supervised: int, checkpointed: bool, cached: bool) -> int:
    """The most bytes that are held at once; rows have an image each. Uses up the model of `setup`."""
    spec, quantization = setup.spec, setup.precision.quantization
    model = setup.shape.model
    core = base_model(model)
    core.config.text_config.use_cache = False
    quantized = quantized_weights(core) if quantization else set()
    if cached:
        tower.install(core)
    keeps_no_head = loss.install(core)
    if checkpointed:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    functional = torch.nn.functional
    with (
        patched(functional, "scaled_dot_product_attention", cuda_sdpa),
        patched(functional, "layer_norm", layer_norm_in_float32),
        patched(loss, "BLOCK", {}),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and id(child.weight) in quantized:
                    setattr(module, name, OfBitsandbytes(child, bits=quantization.bits, double=quantization.double))
        to_fake(model, "cpu")
        if keeps_no_head:
            core._frozen_head[0].weight = core.get_input_embeddings().weight
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        size = (spec.per_device_train_batch_size, num_tokens, num_supervised)
        with Peak("cpu") as memory:
            for tensor in (*model.parameters(), *model.buffers()):
                memory.add(tensor)
            for parameter in trained:  # its states exist after a first step, whatever the gradients
                parameter.grad = torch.empty_like(parameter)
            update(optimizer, trained)
            for _ in range(spec.gradient_accumulation_steps):
                micro_step(model, size, cached=cached)
            update(optimizer, trained)
    return memory.highest


def update(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> None:
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def micro_step(model: Any, size: tuple[int, int, int], *, cached: bool) -> None:
    num_rows, num_tokens, num_supervised = size
    ids, types, attention = (torch.empty((num_rows, num_tokens), dtype=torch.long) for _ in range(3))
    places, labels = (torch.empty((num_rows, num_supervised), dtype=torch.long) for _ in range(2))
    pixels = (torch.empty(num_rows * 256, 1152, dtype=torch.bfloat16) if cached
              else torch.empty(num_rows, 3, 896, 896))  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16), without_waiting_checks():
        found = model(
            input_ids=ids, token_type_ids=types, attention_mask=attention, pixel_values=pixels, labels=ids,
            logits_to_keep=places, shift_labels=labels,
        )  # fmt: skip
    found.loss.backward()


def layer_norm_in_float32(values: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """CUDA's autocast computes and returns float32 here."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return plain_layer_norm(
                values.float(), shape, weight if weight is None else weight.float(),
                bias if bias is None else bias.float(), eps,
            )  # fmt: skip
    return plain_layer_norm(values, shape, weight, bias, eps)


class OfBitsandbytes(nn.Module):
    """A frozen linear layer that computes with bitsandbytes' functions for CUDA, which know fake tensors."""

    def __init__(self, plain: nn.Linear, *, bits: int, double: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.bits, self.double, num = bits, double, plain.weight.numel()
        self.bias = plain.bias
        if bits == 8:
            self.weight = self._frozen(plain.weight.shape, torch.int8)
            self.scales = self._frozen((plain.out_features,), torch.float32)
            return
        self.weight = self._frozen((num // 2, 1), torch.uint8)
        self.scales = self._frozen((num // 64,), torch.uint8 if double else torch.float32)
        self.of_scales = self._frozen((num // 64 // 256,), torch.float32) if double else None

    def _frozen(self, shape: Any, dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.autograd import _functions as functions
        from bitsandbytes.functional import QuantState

        values, bias = values.bfloat16(), None if self.bias is None else self.bias.bfloat16()
        if self.bits == 8:  # without outliers, whose number nobody knows before
            state = functions.MatmulLtState(CB=self.weight, SCB=self.scales)
            state.has_fp16_weights = False
            return functions.MatMul8bitLt.apply(values, self.weight, None, bias, state)  # pyright: ignore[reportReturnType]
        nested = None
        if self.double:
            nested = QuantState(absmax=self.of_scales, code=torch.empty(256), blocksize=256, dtype=torch.float32)
        state = QuantState(
            absmax=self.scales, shape=torch.Size((self.out_features, self.in_features)), code=torch.empty(16),
            blocksize=64, quant_type="nf4", dtype=torch.bfloat16, offset=torch.empty(()) if self.double else None,
            state2=nested,
        )  # fmt: skip
        return functions.matmul_4bit(values, self.weight, quant_state=state, bias=bias)
