"""LoRA adapters that a run starts from: merged into the base, or continued (`adapter_name_or_path`).

All but the last are merged, and the last is continued with its own rank, layers and scale; with `create_new_adapter`
all are merged and a new one begins. Source: llamafactory 0.9.5, `model/adapter.py`.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mllm_assets.errors import ModelError
from mllm_assets.families.family import Family
from mllm_assets.training.runs.models import ADAPTER_WEIGHTS

PLAIN_STARTS = (True, False, "gaussian")  # of PEFT's ways to begin, those that leave the base as it was


def read_config(directory: Path) -> Any:
    """Read `adapter_config.json` as PEFT's configuration of an adapter that trains.

    Raises:
        ModelError: It is not that of a LoRA adapter that its base and its files alone give.
    """
    from peft import LoraConfig

    path = directory / "adapter_config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind, start = values["peft_type"], values.get("init_lora_weights", True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({type(error).__name__}: {error}). Make the adapter again.") from None
    if kind != "LORA":
        raise ModelError(f"{directory} holds an adapter of the kind {kind}: expected LORA. Name another adapter.")
    if start not in PLAIN_STARTS:
        raise ModelError(
            f"The adapter in {directory} began with {start}, which changed its base, so that it fits no other. Name "
            "the merged model of its run in model_name_or_path, and delete adapter_name_or_path."
        )
    try:
        config: Any = LoraConfig.from_pretrained(str(directory))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is not one of a LoRA adapter ({error}). Make the adapter again.") from None
    most = _largest_rank(directory)
    for rank in (config.r, *(config.rank_pattern or {}).values()):
        if type(rank) is not int or not 0 < rank <= most:
            raise ModelError(
                f"{path}: the rank is {rank!r}, and that of the weights is {most}. Make the adapter again."
            )
    config.inference_mode = False
    return config


def merge(model: Any, directories: Sequence[Path], family: Family) -> Any:
    """Return the model with the adapters in its weights; a shape on `meta` as it is.

    Raises:
        ModelError: An adapter does not fit the model, or is on the vision tower.
    """
    for directory in directories:
        config = read_config(directory)
        names = _file_names(directory)
        if on_tower := sorted(name for name in names if any(key in name for key in family.vision_keys)):
            raise ModelError(
                f"The adapter in {directory} is on the vision tower ({on_tower[0]}), whose output is cached from the "
                "model's own files. Merge it first, and name the merged model in model_name_or_path."
            )
        if next(model.parameters()).is_meta:
            continue
        model = merged(_loaded(model, directory, config))
    return model


def resume(model: Any, directory: Path) -> Any:
    """Return PEFT's model with the adapter on it, to train on.

    Raises:
        ModelError: The adapter does not fit the model.
    """
    from peft import get_peft_model

    config = read_config(directory)
    if next(model.parameters()).is_meta:
        config.init_lora_weights = True
        with _quiet():
            return get_peft_model(model, config)
    return _loaded(model, directory, config)


def adapted_modules(model: Any) -> tuple[str, ...]:
    """The paths, in the model below PEFT's, of modules that training changes: with adapters, as copies, or in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    base = model.get_base_model()
    adapted = [path for path, m in base.named_modules() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)]
    return (*adapted, *(name.rpartition(".")[0] for name, p in base.named_parameters() if p.requires_grad))


def merged(adapted: Any) -> Any:
    """The model below PEFT's with the adapters in its weights, and what trained whole in its place."""
    from peft.utils import ModulesToSaveWrapper

    wrapped = [(p, m) for p, m in adapted.get_base_model().named_modules() if isinstance(m, ModulesToSaveWrapper)]
    for path, wrapper in wrapped:  # which OFT's unloading takes for a linear layer
        adapted.get_base_model().set_submodule(path, wrapper.modules_to_save[wrapper.active_adapters[0]])
    return adapted.merge_and_unload()


def _loaded(model: Any, directory: Path, config: Any) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with _quiet():
            adapted = PeftModel.from_pretrained(model, str(directory), config=config, is_trainable=True)
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"The adapter in {directory} does not fit the model ({reason}). Name the model that it was trained on in "
            "model_name_or_path."
        ) from None
    wanted, found = set(get_peft_model_state_dict(adapted)), _file_names(directory)
    if wanted != found:
        some = sorted(wanted ^ found)
        raise ModelError(
            f"The adapter in {directory} does not fit the model: {len(some)} of its tensors, such as {some[0]}, are "
            "not in both. Name the model that it was trained on in model_name_or_path."
        )
    return adapted


def _file_names(directory: Path) -> set[str]:
    return set(_shapes(directory))


def _largest_rank(directory: Path) -> int:
    return max((shape[0] for name, shape in _shapes(directory).items() if ".lora_A." in name and shape), default=0)


def _shapes(directory: Path) -> dict[str, list[int]]:
    try:
        with safe_open(directory / ADAPTER_WEIGHTS, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{directory / ADAPTER_WEIGHTS} cannot be read ({error}). Make the adapter again.") from None


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 reads a name that transformers 5.23 deprecates
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # they are an error here
        yield
