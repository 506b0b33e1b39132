"""CUDA's semantics without CUDA: fake tensors on a CPU machine, and what CUDA's kernels would hold in memory.

A fake tensor has shape, dtype and device, and no content. PyTorch lets it be on `cuda` where there is none, once a
device guard is registered that does nothing. A whole step then shows every device, dtype and byte that CUDA would.
"""

import contextlib
import ctypes
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoModelForImageTextToText, Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry, by DeviceType
CUDA, META = 1, 14  # of c10/core/DeviceType.h
ALLOCATION_BYTES = 512  # CUDA's caching allocator rounds up to them
VIEWS = frozenset(
    "view _unsafe_view transpose permute expand slice select unsqueeze squeeze t split alias detach as_strided unbind "
    "split_with_sizes reshape flatten _reshape_alias unflatten lift_fresh unfold device sym_size is_same_size "
    "_has_compatible_shallow_copy_type".split()
)
SYNCHRONISING = frozenset("_local_scalar_dense nonzero masked_select is_nonzero item equal unique _unique2".split())


def gemma3_config(*, layers: int = 34, vision_layers: int = 27, **sizes: Any) -> Any:
    """The shape of gemma-3-4b, with fewer layers where asked, and with other `sizes` of the text model."""
    text = {
        "vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 1024,
    } | sizes  # fmt: skip
    return Gemma3Config(
        text_config=Gemma3TextConfig(num_hidden_layers=layers, max_position_embeddings=131072, **text),
        vision_config=SiglipVisionConfig(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=vision_layers, num_attention_heads=16,
            image_size=896, patch_size=14, vision_use_head=False,
        ),
        mm_tokens_per_image=256, boi_token_index=5, eoi_token_index=6, image_token_index=7, tie_word_embeddings=True,
    )  # fmt: skip


def meta_model(dtype: torch.dtype = torch.bfloat16, **shape: Any) -> Any:
    """A Gemma 3 on `meta`."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(gemma3_config(**shape)).to(dtype)


def to_fake(model: nn.Module, device: str = "cuda") -> None:
    """Move a model's tensors from `meta` to fake ones; call it inside `fake_cuda`. Tied tensors stay tied."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in moved:
                like = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                moved[id(parameter)] = nn.Parameter(like, requires_grad=parameter.requires_grad)
            module._parameters[name] = moved[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def cuda_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The kernels that CUDA takes: flash without a mask, memory-efficient with one, whose booleans become a bias."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    bias = attn_mask
    if attn_mask.dtype == torch.bool:
        bias = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
        bias = bias.masked_fill(~attn_mask, float("-inf"))
    bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    keeps_sums = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, keeps_sums, dropout_p, is_causal, scale=scale)[0]


def register_device_guard() -> None:
    """Give `cuda` the device guard of `meta`, which does nothing, in a PyTorch that was built without CUDA."""
    torch._C._ensureCUDADeviceGuardSet()  # does so itself in a build with CUDA
    [library] = [p for p in (Path(torch.__file__).parent / "lib").iterdir() if p.stem == "libc10"]
    guards = (ctypes.c_void_p * (META + 1)).in_dll(ctypes.CDLL(str(library)), GUARDS)
    if guards[CUDA] is None:
        guards[CUDA] = guards[META]


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Within it `torch.empty(..., device="cuda")` is a fake tensor, under autocast's rules of CUDA."""
    register_device_guard()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", cuda_sdpa)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


class Peak(TorchDispatchMode):
    """Counts the live bytes of storages on one device, kernels by name, and operations that wait for the device."""

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device, self.now, self.highest = device, 0, 0
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._live: set[int] = set()

    def add(self, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._live:
            return
        num_bytes = -(-storage.nbytes() // ALLOCATION_BYTES) * ALLOCATION_BYTES
        self._live.add(storage._cdata)
        self.now += num_bytes
        self.highest = max(self.highest, self.now)
        weakref.finalize(storage, self._drop, storage._cdata, num_bytes)

    def _drop(self, key: int, num_bytes: int) -> None:
        self._live.discard(key)
        self.now -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(made)[0]:
            self.add(tensor)
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.kernels[name] += 1
        is_boolean_index = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in SYNCHRONISING or is_boolean_index:
            self.waits["boolean index" if is_boolean_index else name] += 1
        return made
