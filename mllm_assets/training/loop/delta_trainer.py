"""A `Trainer` whose checkpoints hold what trains, completely or not at all: on one process, on many, or sharded.

A sharded run's checkpoint holds the same complete tensors as any other. DeepSpeed adds its own files for the optimizer.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from mllm_assets.artifacts import find_damage, fsync_path, is_complete, write_manifest
from mllm_assets.disk import no_space_is_an_error
from mllm_assets.errors import IntegrityError
from mllm_assets.file_digests import FileDigests
from mllm_assets.training.loop.checkpoints import (
    TRAINABLE_FILE,
    checkpoint_dirs,
    load_trainable,
    require_fit,
    save_trainable,
    trainable_tensors,
)

OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"  # the library's names
# complete tensors by parameter name, on the first process only
GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
SPREAD = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)


class DeltaTrainer(Trainer):
    """A `Trainer` that saves and loads deltas.

    `args.save_total_limit` counts published checkpoints; an older one is deleted only after a newer one is complete.

    Attributes:
        conditions: What must stay for an exact resume: processes, precision, sharding, device. In each manifest.
        digests: Of the files that the run reads. Where one changed, no checkpoint is complete: a resume would go on
            from it under the name of what was there before.
    """

    model: Any
    lr_scheduler: Any
    digests: FileDigests | None = None
    _staging: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in self.model.parameters()})
        autocast = "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "no"
        self.conditions: dict[str, Any] = {
            "num_processes": self.args.world_size,
            "precision": f"{'+'.join(dtypes)} weights, {autocast} autocast",
            "sharding": "fsdp" if self.is_fsdp_enabled else "deepspeed" if self.is_deepspeed_enabled else "none",
            "device": self.args.device.type,
        }
        self._names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self._num_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp_plugin_args is None or state.distributed_type != DistributedType.MULTI_CPU:
            return
        # accelerate 1.15 reads FSDP on accelerators only and would silently fall back to DDP; PyTorch's FSDP runs on
        # CPUs as well
        arguments: dict[str, Any] = self.args.fsdp_plugin_args
        plugin = FullyShardedDataParallelPlugin(**arguments)
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)
        state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
        self.is_fsdp_enabled = True

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds all of what trains."""
        return self.conditions["sharding"] != "none"

    def gather_trainable(self) -> dict[str, torch.Tensor]:
        """Return complete trainable tensors on the CPU. Every process calls it; with FSDP only the first gets them."""
        if is_fsdp(self.model):
            state: dict[str, Any] = get_model_state_dict(self.model, options=GATHER)
            return {name: state[name].contiguous() for name in self._names} if state else {}
        model = self.accelerator.unwrap_model(self.model)
        if not self.is_deepspeed_enabled:
            return trainable_tensors(model)
        from deepspeed.zero import GatheredParameters  # pyright: ignore[reportMissingImports]

        with GatheredParameters([p for p in model.parameters() if p.requires_grad]):  # ZeRO 3 shards them
            return {name: tensor.clone() for name, tensor in trainable_tensors(model).items()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_sharded and not self.args.should_save:
            return
        tensors = self.gather_trainable()
        if self.args.should_save:
            save_trainable(tensors, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        saved = load_file(directory / TRAINABLE_FILE)
        target: Any = self.model if model is None else model
        if is_fsdp(target):
            require_fit(target, saved, directory)  # names that the model does not have would be passed over
            set_model_state_dict(target, dict(saved), options=SPREAD)
            return
        plain = self.accelerator.unwrap_model(target)
        require_fit(plain, saved, directory)
        load_trainable(plain, saved)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_fsdp(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = get_optimizer_state_dict(self.model, self._plain_optimizer(), options=GATHER)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_FILE)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_fsdp(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER_FILE, weights_only=True, map_location="cpu")
        set_optimizer_state_dict(self.model, self._plain_optimizer(), state, options=SPREAD)
        scheduler_state = torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler_state)

    def _plain_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it

    def _load_best_model(self) -> None:
        best = self._best()
        assert best is not None
        damage = find_damage(best) if is_complete(best) else "it is not complete"
        if damage is not None:
            raise IntegrityError(
                f"The best checkpoint {best} cannot be loaded: {damage}. Run again: it goes on from one before."
            )
        self._load_from_checkpoint(str(best))

    def _best(self) -> Path | None:
        """The best checkpoint so far. The library's own path is that of the staging folder, or of an earlier run."""
        step = self.state.best_global_step
        return Path(str(self.args.output_dir)) / f"checkpoint-{step}" if step else None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(str(self.args.output_dir))
        target = run_dir / f"checkpoint-{self.state.global_step}"
        staging = run_dir / f".{target.name}.tmp"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            (staging / target.name).mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._staging = staging
        try:
            with no_space_is_an_error(staging, f"checkpoint-{self.state.global_step}", 3 * self._num_bytes):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                self.state.best_model_checkpoint = str(best) if (best := self._best()) else None
                if self.args.should_save:
                    self.state.save_to_json(str(staging / target.name / TRAINER_STATE_NAME))
                    payload = {"step": self.state.global_step, "conditions": self.conditions}
                    if self.digests is not None:
                        self.digests.require_unchanged()
                    write_manifest(staging / target.name, payload)
                    shutil.rmtree(target, ignore_errors=True)
                    (staging / target.name).rename(target)
                    fsync_path(run_dir)
        finally:
            self._staging = None
            self.args.save_total_limit = limit
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        if self.args.should_save and limit:
            complete = [path for path in checkpoint_dirs(run_dir) if is_complete(path)]
            for path in complete[:-limit]:
                if path != self._best():
                    shutil.rmtree(path)


def with_layers(config: Mapping[str, Any] | None, model: Any) -> dict[str, Any]:
    """Name the layers that FSDP wraps, where `fsdp_config` does not.

    accelerate takes every class that the model lists, and fails on those that are not in this model.
    """
    config = {key.removeprefix("fsdp_"): value for key, value in (config or {}).items()}
    if "transformer_layer_cls_to_wrap" in config or "auto_wrap_policy" in config or config.get("min_num_params"):
        return config
    present = {type(module).__name__ for module in model.modules()}
    return {**config, "transformer_layer_cls_to_wrap": sorted(present & set(model._no_split_modules))}


def is_fsdp(model: Any) -> bool:
    """Whether FSDP (version 2) has sharded a model."""
    return isinstance(model, FSDPModule)
