"""A `Trainer` whose checkpoints hold what trains, whole or not at all: on one process, on many, or sharded.

A sharded run's checkpoint holds the same whole tensors as any other. DeepSpeed adds its own files for the optimizer.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from mllm_assets.artifacts import find_damage, fsync_path, is_complete, write_manifest
from mllm_assets.errors import IntegrityError
from mllm_assets.training import sharding
from mllm_assets.training.checkpoints import (
    TRAINABLE_FILE,
    checkpoint_dirs,
    load_trainable,
    no_space_is_an_error,
    require_fit,
    save_trainable,
    trainable_tensors,
)

OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"  # the library's names


class DeltaTrainer(Trainer):
    """A `Trainer` that saves and loads deltas.

    `args.save_total_limit` counts published checkpoints; an older one goes only after a newer one is complete.

    Attributes:
        conditions: What must stay for an exact resume: processes, precision, sharding, device. In each manifest.
    """

    model: Any
    lr_scheduler: Any
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
        # accelerate 1.15 reads FSDP on accelerators only and would fall back to DDP in silence; PyTorch's FSDP runs on
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
        """Return what trains, whole, on the CPU. Every process calls it; sharded, the first one gets the tensors."""
        if sharding.is_fsdp(self.model):
            return sharding.gather_trainable(self.model, self._names)
        model = self.accelerator.unwrap_model(self.model)
        if self.is_deepspeed_enabled:
            return sharding.gather_from_deepspeed(model)
        return trainable_tensors(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_sharded and not self.args.should_save:
            return
        tensors = self.gather_trainable()
        if self.args.should_save:
            save_trainable(tensors, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        saved = load_file(directory / TRAINABLE_FILE)
        model = self.model if model is None else model
        assert model is not None
        if sharding.is_fsdp(model):
            require_fit(model, saved, directory)
            sharding.spread_trainable(model, saved)
            return
        plain = self.accelerator.unwrap_model(model)
        require_fit(plain, saved, directory)
        load_trainable(plain, saved)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not sharding.is_fsdp(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = sharding.gather_optimizer(self.model, self._plain_optimizer())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_FILE)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not sharding.is_fsdp(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER_FILE, weights_only=True, map_location="cpu")
        sharding.spread_optimizer(self.model, self._plain_optimizer(), state)
        scheduler_state = torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler_state)

    def _plain_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it

    def _load_best_model(self) -> None:
        best = self._best()
        assert best is not None
        damage = find_damage(best) if is_complete(best) else "it is not complete"
        if damage is not None:
            raise IntegrityError(f"The best checkpoint {best} cannot be loaded: {damage}. Delete it and run again.")
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
            self._drop_old(run_dir, limit)

    def _drop_old(self, run_dir: Path, limit: int) -> None:
        complete = [path for path in checkpoint_dirs(run_dir) if is_complete(path)]
        for path in complete[:-limit]:
            if path != self._best():
                shutil.rmtree(path)
