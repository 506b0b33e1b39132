"""Loading a model of a known family, its processor, and its shape on the `meta` device."""

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from mllm_assets.artifacts import digest_json, sha256_file
from mllm_assets.errors import ModelError
from mllm_assets.families.family import Family, family_of, require_images
from mllm_assets.file_digests import state_of
from mllm_assets.hub.snapshot import require_safe_shards
from mllm_assets.training.models import masks
from mllm_assets.training.models.device import is_out_of_memory
from mllm_assets.training.models.own_processor import OwnProcessor, copy_processor_files
from mllm_assets.training.models.quantization import Quantization, keep_trainable

MAX_LAYERS, MAX_NUMBER = 1000, 2**40  # in a configuration
MAX_PARAMS_A_BYTE = 4  # two where they have 4 bits
CHECKS_OFF = "TRANSFORMERS_DISABLE_TORCH_CHECK"

masks.install()  # before a model is simulated or loaded


def quiet_libraries() -> None:
    """Keep transformers' own bars and advice off the terminal: progress is ours to report."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextmanager
def without_waiting_checks() -> Iterator[None]:
    """Leave out transformers' comparison of image tokens and features, for which the host would wait for the device.

    Rows are refused before a run where the two differ, see `encode.py`, and so are cached features, see `collate.py`.
    """
    before, written = os.environ.get(CHECKS_OFF), torch.Tensor.__format__
    os.environ[CHECKS_OFF] = "1"
    # the check's message, with both numbers in it, is written before anybody asks whether it is wanted
    torch.Tensor.__format__ = _format_unread
    try:
        yield
    finally:
        torch.Tensor.__format__ = written
        if before is None:
            del os.environ[CHECKS_OFF]
        else:
            os.environ[CHECKS_OFF] = before


def _format_unread(self: torch.Tensor, format_spec: str) -> str:
    return f"a tensor on {self.device}"


def load_config(directory: Path, *, of_plain_weights: bool = True) -> Any:
    """Read a model directory's configuration, by default only where its weights are stored as they are.

    Raises:
        ModelError: The directory does not exist, or does not hold a model of a known family.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{directory} is not a model directory: it has no config.json. Point to a Hugging Face model directory, "
            f"for example the `model` folder of a run, or download one into pretrains/."
        )
    values, config = _config(directory, state_of(path.stat()))
    if of_plain_weights:
        _require_plain_weights(values, path)
    return copy.deepcopy(config)


@lru_cache(maxsize=8)
def _config(directory: Path, state: tuple[int, int]) -> tuple[dict[str, Any], Any]:
    """A run asks for the same two configurations a dozen times; `state` is the file's, so that a new one is read."""
    path = directory / "config.json"
    values = _read_settings(path)
    require_images(values.get("model_type"), MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, str(directory))
    try:
        return values, AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what a file holds ends in errors of any kind, the library's own ones too
        raise ModelError(f"{path} does not describe a model ({_reason(error)}). Download the model again.") from error


def _read_settings(path: Path) -> dict[str, Any]:
    """A `config.json` whose numbers a model can have: the library makes as many layers as it says, one by one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({_reason(error)}). Download the model again.") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected an object, found {type(values).__name__}. Download the model again.")
    parts = [("", values)]
    for key, value in parts:  # grows meanwhile
        if isinstance(value, dict):
            parts += value.items()
        is_count = any(word in key for word in ("layers", "depth", "experts"))
        if type(value) is int and abs(value) > (MAX_LAYERS if is_count else MAX_NUMBER):
            raise ModelError(f"{path}: {key} is {value}, which no model has. Download the model again.")
    return values


def _require_plain_weights(values: Mapping[str, Any], path: Path) -> None:
    """Refuse a model that was stored quantised: the library loads what it does not know as if it were not."""
    for part in (values, *(value for value in values.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            if found := part.get(key):
                method = found.get("quant_method", "unnamed") if isinstance(found, dict) else found
                raise ModelError(
                    f"{path}: {key} says that the weights are quantised (quant_method {str(method)[:40]!r}), and only "
                    "plain ones are read. Download the model that it was made of, and set quantization_bit in the "
                    "recipe where it has to be small."
                )


def _require_weights_for(config: Any, directory: Path) -> None:
    """Refuse a configuration of far more than the files hold: the library would fill memory with the rest first."""
    if not (held_bytes := sum(path.stat().st_size for path in directory.glob("*.safetensors"))):
        return
    with torch.device("meta"):
        described = sum(p.numel() for p in AutoModelForImageTextToText.from_config(config).parameters())
    if described > MAX_PARAMS_A_BYTE * held_bytes:
        raise ModelError(
            f"{directory}/config.json describes a model of {described:,} parameters, and its weights have "
            f"{held_bytes:,} bytes. Make or download the model again."
        )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def load_processor(directory: Path, *, of_plain_weights: bool = True) -> Any:
    """Load a model's processor: `tokenizer`, `image_processor`, and what its family's image slots read.

    Raises:
        ModelError: Its files are missing or damaged.
    """
    config = load_config(directory, of_plain_weights=of_plain_weights)
    family = family_of(config.model_type)
    try:
        if not family.is_described:
            return OwnProcessor(directory, family, config)
        if family.loads_whole_processor:
            return AutoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        return ImageTextProcessor(directory, family, config.vision_config)
    except ModelError:
        raise
    except Exception as error:  # as for a configuration
        raise ModelError(
            f"{directory} has no usable processor ({_reason(error)}). "
            f"Copy tokenizer.json, tokenizer_config.json and processor_config.json of the model into it."
        ) from error


def load_model(
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantization: Quantization | None = None,
    attention: str | None = None,
) -> Any:
    """Load weights strictly: every key of the model is in the files and every key of the files in the model.

    Args:
        directory: Of safetensors.
        dtype: Of all weights; None keeps the directory's own.
        device: Where the model is put.
        quantization: Of the frozen linear layers, on `device`: each layer's weight is put there and quantised there.
        attention: What computes attention, by transformers' name; None for the model's usual one.

    Raises:
        ModelError: No known family, no weights, or keys are missing or unexpected.
    """
    config = load_config(directory)
    require_safe_shards(directory, "Make or download the model again.")
    quantized: dict[str, Any] = {}
    if quantization is not None:
        how = quantization.config(dtype or torch.float32)
        quantized = {"quantization_config": how, "device_map": {"": str(device)}}
    try:
        _require_weights_for(config, directory)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            directory,
            config=config,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation=attention,
            **quantized,
        )
    except ModelError:
        raise
    except Exception as error:  # safetensors has a class of its own, and a configuration may name anything
        if is_out_of_memory(error):
            raise
        raise (quantization.unloadable if quantization else _unloadable)(directory, error) from error
    model, info = loaded
    problems = {kind: sorted(info[f"{kind}_keys"], key=str) for kind in ("missing", "unexpected", "mismatched")}
    if any(problems.values()):
        counts = ", ".join(f"{len(keys)} {kind}" for kind, keys in problems.items() if keys)
        first = next(keys[0] for keys in problems.values() if keys)
        raise ModelError(
            f"The weights in {directory} do not fit the model: {counts} keys, such as {first}. "
            f"Make or download the model again."
        )
    keep_trainable(model)
    _require_numbers(model.to(device), directory)
    return model


def _unloadable(directory: Path, error: Exception) -> ModelError:
    if not any(directory.glob("*.safetensors")) and (pickled := sorted(directory.glob("*.bin"))):
        return ModelError(
            f"{pickled[0]} is a pickle, which can run code when it is loaded, with no safetensors next to it. "
            "Where you trust it: AutoModelForImageTextToText.from_pretrained(DIR).save_pretrained(NEW_DIR)."
        )
    return ModelError(f"The weights in {directory} cannot be loaded ({_reason(error)}). Make or download them again.")


def _require_numbers(model: Any, directory: Path) -> None:
    """Refuse weights with NaN or infinity in them: every loss and answer would be NaN, and nothing says of what.

    A pass over what is in memory: 0.1 s a GB on one core, where reading it took ten times as long; less on a GPU.
    """
    damaged: dict[int, str] = {}  # a tensor that has two names is one
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel():
            if not all(math.isfinite(bound) for bound in torch.aminmax(tensor)):
                damaged.setdefault(tensor.data_ptr(), f"{name} ({tensor.dtype})")
    if damaged:
        first, more = next(iter(damaged.values())), f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise ModelError(
            f"The weights in {directory} hold NaN or infinity: {first}{more}, so that every loss and answer would "
            "be NaN. Make or download the model again; where it is loaded as float16 it may need bf16 or float32."
        )


def model_on_meta(config: Any, *, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Any:
    """Return the model's shape without any memory behind it."""
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    return model.to(dtype)


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Cast what files hold, and leave the model as `load_model` with that dtype would make it from them.

    `model.to(dtype)` would round the rotary frequencies, and keeps the rounding of Gemma's embedding scale from before:
    neither is in a file.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale.data = torch.tensor(module.scalar_embed_scale, device=model.device).to(dtype)
    for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        if config is not None:
            config.dtype = dtype


def publishing_dtype(directory: Path, trained: torch.dtype) -> torch.dtype:
    """The dtype in which trained tensors are put into the model that they were trained from.

    Wider than the one it was trained in where its files are: what stayed frozen is then published as it was.
    """
    return torch.promote_types(load_config(directory).dtype or torch.float32, trained)


def release(model: Any) -> None:
    """Free a model's memory, even while something such as an optimizer still holds its parameters."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


@torch.no_grad()
def batch_loss(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Return the mean loss in nats over a batch's supervised tokens, without dropout or autocast."""
    model.eval()
    moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
    return float(model(**with_pixels_as(moved, model.dtype), use_cache=False).loss)


def with_pixels_as(batch: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A batch with its pixels, those of videos too, in a dtype."""
    return {name: value.to(dtype) if name.startswith("pixel_values") else value for name, value in batch.items()}


def weights_digest(directory: Path, digest: Callable[[Path], str] = sha256_file) -> str:
    """Return the sha256 digest over a directory's weight files only."""
    return digest_json({path.name: digest(path) for path in sorted(directory.glob("*.safetensors"))})


def base_model(model: Any) -> Any:
    """Return the model inside, which LoRA wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class ImageTextProcessor:
    """Tokenizer and image processor of a model whose complete processor would need more, such as torchvision."""

    def __init__(self, directory: Path, family: Family, vision_config: Any) -> None:
        self.family = family
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        self.image_processor: Any = AutoImageProcessor.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        self.directory = directory
        self.vision_config = vision_config

    def save_pretrained(self, directory: Path | str) -> None:
        """Copy the processor's files unchanged, those for video included."""
        copy_processor_files(self.directory, Path(directory))

    def settings(self) -> dict[str, Any]:
        """Return the content of `processor_config.json`."""
        return json.loads((self.directory / "processor_config.json").read_text(encoding="utf-8"))
