"""The language model's linear layers in 8 bits, as `compressed-tensors` keeps them: what vLLM and transformers read.

One scale for each output channel, from the weights alone: nothing is calibrated. Embeddings, output layer, vision tower
and projector stay as they are, which is usual: they are small, and answers suffer most from them.
"""

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import AutoModelForImageTextToText

from mllm_assets.artifacts import write_json_atomic
from mllm_assets.errors import IntegrityError, MachineError, ModelError
from mllm_assets.families.family import family_of
from mllm_assets.training.models.load import load_model, quiet_libraries
from mllm_assets.training.models.own_processor import PROCESSOR_FILES
from mllm_assets.training.models.parts import with_parts

INSTALL = "pip install -c constraints.txt -e '.[int8]'"
KEPT_FILES = (*PROCESSOR_FILES, "generation_config.json")
WEIGHTS = {"num_bits": 8, "symmetric": True, "strategy": "channel", "dynamic": False}
FORMATS = {"int8": ("int", "pack-quantized"), "fp8": ("float", "float-quantized")}  # of numbers, and of files
ROUTERS = "re:.*(mlp\\.gate|router.*)$"  # few weights that choose experts


def require_installed() -> None:
    """Refuse to begin without the library.

    Raises:
        MachineError: It is missing.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise MachineError(f"8-bit weights need compressed-tensors, which is not installed. Install it: {INSTALL}")


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep the library's bars off the terminal, as `quiet_libraries` does transformers'."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


def write_8bit(source: Path, directory: Path, weights: Literal["int8", "fp8"] = "int8") -> int:
    """Write a model with 8-bit weights into an existing directory; returns how many layers have them.

    Raises:
        MachineError: `compressed-tensors` is not installed.
        ModelError: The model cannot be loaded, or has no linear layers in its language model.
    """
    require_installed()
    # an extra, which may not be installed
    from compressed_tensors.compressors import ModelCompressor  # pyright: ignore[reportMissingImports]
    from compressed_tensors.quantization import (  # pyright: ignore[reportMissingImports]
        QuantizationConfig,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams  # pyright: ignore[reportMissingImports]

    quiet_libraries()
    model = load_model(source)
    settings = _settings(model, weights)
    with without_bars():
        apply_quantization_config(model, QuantizationConfig.model_validate(settings))
    layers = [module for module in model.modules() if hasattr(module, "quantization_scheme")]
    if not layers:
        raise ModelError(f"{source} has no linear layers in its language model, so there is nothing to quantise.")
    for layer in layers:
        weight = layer.weight.data
        lowest, highest = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
        scale, _ = calculate_qparams(lowest, highest, layer.quantization_scheme.weights)
        layer.weight_scale.data.copy_(scale)
    with without_bars():
        ModelCompressor.from_pretrained_model(model).compress_model(model)
        model.save_pretrained(directory)
    config = json.loads((source / "config.json").read_bytes())  # with the spelling of older versions beside
    write_json_atomic(directory / "config.json", {**config, "quantization_config": settings})
    for path in {path for pattern in KEPT_FILES for path in source.glob(pattern)}:
        shutil.copyfile(path, directory / path.name)
    return len(layers)


def _settings(model: Any, weights: str) -> dict[str, Any]:
    """What `config.json` says of the weights. Names are patterns: modules and files have other prefixes."""
    numbers, files = FORMATS[weights]
    family = family_of(model.config.model_type)
    if not family.is_described:
        family = with_parts(family, model)
    keys = [key.removeprefix("model.") for key in (*family.vision_keys, *family.projector_keys)]
    decoder = {id(module) for module in model.get_decoder().modules()}
    beside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in decoder and not any(key in name for key in keys)
    ]
    patterns = ["lm_head", *(f"re:.*{key.replace('.', chr(92) + '.')}.*" for key in keys), ROUTERS]
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": files,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**WEIGHTS, "type": numbers},
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": list(dict.fromkeys([*patterns, *beside])),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def load_8bit(directory: Path, device: str) -> Any:
    """Load such a model as any user would, strictly.

    Raises:
        IntegrityError: A tensor is missing or unexpected.
    """
    quiet_libraries()
    loader: Any = AutoModelForImageTextToText
    with without_bars():
        model, info = loader.from_pretrained(
            directory, dtype="auto", output_loading_info=True, local_files_only=True, use_safetensors=True
        )
    _require_all(directory, info)
    return model.to(device).eval()


def _require_all(directory: Path, info: Mapping[str, Any]) -> None:
    for kind in ("missing", "unexpected", "mismatched"):
        if keys := sorted(info[f"{kind}_keys"], key=str):
            raise IntegrityError(
                f"{directory} was written with {len(keys)} {kind} tensors, such as {keys[0]}. Its packages may not fit "
                f"together: {INSTALL}"
            )
