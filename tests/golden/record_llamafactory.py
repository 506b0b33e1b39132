"""Record what LLaMA-Factory itself computes, into tests/golden/llamafactory/<case>.json. The tests only read those.

In an environment of its own, since its pins exclude this project's (torchvision is left out, so that transformers
takes the Pillow image processor, as here):

    python -m venv lf && lf/bin/pip install -r tests/golden/llamafactory_requirements.txt
    lf/bin/pip install --no-deps llamafactory==0.9.5
    OMP_NUM_THREADS=1 lf/bin/python tests/golden/record_llamafactory.py [CASE ...]

Float32, one thread, on the model of tests/golden/parity and the data of fidelity_data.py.
"""

import importlib.machinery
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
# llamafactory imports torchaudio whatever the data, and PyPI's does not load beside a CPU build of torch
audio = types.ModuleType("torchaudio")
audio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
sys.modules["torchaudio"] = audio

import fidelity_data  # noqa: E402

BASE = {
    "stage": "sft",
    "do_train": True,
    "template": "gemma3",
    "finetuning_type": "full",
    "freeze_vision_tower": True,
    "freeze_multi_modal_projector": False,
    "freeze_language_model": False,
    "dataset": "every_mode",
    "cutoff_len": 512,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "num_train_epochs": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "seed": 42,
}
LORA = {"finetuning_type": "lora", "freeze_multi_modal_projector": True, "lora_target": "all"}
CASES: dict[str, dict[str, Any]] = {
    "every_image_mode_tower_trains": {"freeze_vision_tower": False, "weight_decay": 0.1},
    "every_image_mode_projector": {"freeze_language_model": True, "seed": 7},
    "uneven_accumulation": {
        "dataset": "conversations", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3,
        "num_train_epochs": 3, "seed": 11,
    },
    "batch_of_five": {"per_device_train_batch_size": 5, "seed": 3, "weight_decay": 0.05},
    "last_batch_dropped": {"per_device_train_batch_size": 4, "dataloader_drop_last": True, "seed": 5},
    "data_seed": {"data_seed": 123, "per_device_train_batch_size": 3},
    "grouped_by_length": {"dataset": "conversations", "train_sampling_strategy": "group_by_length"},
    "batches_without_images": {
        "dataset": "some_without_image", "per_device_train_batch_size": 1, "freeze_language_model": True,
        "num_train_epochs": 1, "weight_decay": 0.1, "seed": 2,
    },
    "batches_without_images_full": {
        "dataset": "some_without_image", "num_train_epochs": 2, "weight_decay": 0.1, "freeze_vision_tower": False,
    },
    "freeze_first_layer": {"finetuning_type": "freeze", "freeze_trainable_layers": -1},
    "freeze_modules": {
        "finetuning_type": "freeze", "freeze_trainable_layers": 3, "freeze_trainable_modules": "self_attn,mlp",
        "freeze_extra_modules": "norm,embed_tokens", "freeze_multi_modal_projector": True,
    },
    "freeze_tower_layers": {"finetuning_type": "freeze", "freeze_trainable_layers": -1, "freeze_vision_tower": False},
    "lora_all": {**LORA},
    "lora_some_modules": {**LORA, "lora_target": "q_proj,v_proj", "lora_rank": 4, "lora_alpha": 12, "seed": 9},
    "lora_tower": {**LORA, "freeze_vision_tower": False, "lora_rank": 2},
    "lora_dropout": {**LORA, "lora_dropout": 0.2, "lora_rank": 4},
    "lora_rslora": {**LORA, "use_rslora": True, "lora_rank": 4},
    "lora_dora": {**LORA, "use_dora": True, "lora_rank": 4},
    "train_on_prompt": {"dataset": "conversations", "train_on_prompt": True, "num_train_epochs": 1},
    "mask_history": {"dataset": "conversations", "mask_history": True, "num_train_epochs": 1},
    "mask_history_cut": {"dataset": "late_image", "mask_history": True, "cutoff_len": 90, "num_train_epochs": 1},
    "cut": {"cutoff_len": 40, "num_train_epochs": 1},
    "two_datasets": {"dataset": "conversations,one_image", "max_samples": 4, "disable_shuffling": True},
    "interleave_under": {"dataset": "conversations,one_image", "mix_strategy": "interleave_under"},
    "interleave_over": {
        "dataset": "conversations,one_image", "mix_strategy": "interleave_over", "interleave_probs": "0.7,0.3",
        "num_train_epochs": 1, "seed": 4,
    },
    "val_size_share": {
        "dataset": "conversations,one_image", "val_size": 0.25, "eval_strategy": "epoch", "seed": 6,
    },
    "val_size_rows": {"val_size": 3, "eval_strategy": "epoch", "disable_shuffling": True},
    "packing": {"dataset": "conversations", "packing": True, "cutoff_len": 160, "per_device_train_batch_size": 1},
    "packing_small_groups": {
        "dataset": "every_mode,some_without_image", "packing": True, "cutoff_len": 128,
        "preprocessing_batch_size": 7, "preprocessing_num_workers": 2,
    },
    "neat_packing": {
        "dataset": "conversations", "neat_packing": True, "cutoff_len": 160, "per_device_train_batch_size": 1,
    },
    "neftune": {"neftune_noise_alpha": 5.0, "freeze_language_model": True},
    "smoothed": {"label_smoothing_factor": 0.2, "val_size": 0.25, "eval_strategy": "epoch"},
    "smoothed_frozen_head": {
        "label_smoothing_factor": 0.1, "finetuning_type": "freeze", "freeze_trainable_layers": 1,
    },
    "eager": {"flash_attn": "disabled", "num_train_epochs": 1},
    "lora_plus": {**LORA, "loraplus_lr_ratio": 8.0, "lora_rank": 4, "additional_target": "multi_modal_projector"},
    "oft": {
        "finetuning_type": "oft", "freeze_multi_modal_projector": True, "oft_block_size": 16, "learning_rate": 1e-2,
        "additional_target": "multi_modal_projector",
    },
    "muon": {"use_muon": True, "weight_decay": 0.05, "freeze_vision_tower": False, "num_train_epochs": 1},
    "lora_pissa_exact": {**LORA, "pissa_init": True, "pissa_iter": -1, "lora_rank": 4},
    "stable_decay": {"lr_scheduler_type": "warmup_stable_decay", "per_device_train_batch_size": 1},
    "evaluated_apart": {
        "dataset": "conversations", "eval_dataset": "one_image,every_mode", "eval_on_each_dataset": True,
        "eval_strategy": "epoch", "num_train_epochs": 1,
    },
    "pan_and_scan": {"image_do_pan_and_scan": True, "num_train_epochs": 1},
    "new_tokens": {"add_tokens": "heart star,moon", "add_special_tokens": "tree", "num_train_epochs": 1},
    # its embeddings grow, by random rows
    "new_tokens_grow": {
        "add_tokens": ",".join(["heart star", *(f"<place_{i}>" for i in range(60))]), "num_train_epochs": 1,
    },
    # the last: LLaMA-Factory writes it into the template, where the next case in this process would find it
    "default_system": {"dataset": "conversations", "default_system": "Name what you see.", "num_train_epochs": 1},
}  # fmt: skip


def record(case: str, work: Path) -> dict[str, Any]:
    """Train one case in this process and return what came of it."""
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp

    found: dict[str, Any] = {}

    class Recording(workflow.CustomSeq2SeqTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            found["trainable"] = [[name, list(p.shape)] for name, p in named]
            found["start"] = {name: float(p.double().abs().sum()) for name, p in named}
            for split, data in (("train", self.train_dataset), ("eval", self.eval_dataset)):
                columns = ("input_ids", "labels", "position_ids", "attention_mask")
                parts = data.values() if isinstance(data, dict) else [data or []]
                found[f"{split}_rows"] = [
                    {key: row[key] for key in columns if key in row} for part in parts for row in part
                ]
            result = super().train(*args, **kwargs)
            found["logs"] = [
                {key: log[key] for key in log if key in ("step", "grad_norm", "learning_rate") or key.endswith("loss")}
                for log in self.state.log_history
                if any(key == "loss" or (key.startswith("eval") and key.endswith("loss")) for key in log)
            ]
            return result

    original: Callable[..., Any] = workflow.CustomSeq2SeqTrainer
    workflow.CustomSeq2SeqTrainer = Recording
    config = {**BASE, **CASES[case]}
    places = {
        "model_name_or_path": str(HERE / "parity" / "model"),
        "dataset_dir": str(work / "data"),
        "output_dir": str(work / case),
        "overwrite_cache": True,
    }
    try:
        run_exp(args={**config, **places})
    finally:
        workflow.CustomSeq2SeqTrainer = original
    if not found["train_rows"][0].keys() - {"input_ids", "labels", "attention_mask"}:
        for row in [*found["train_rows"], *found["eval_rows"]]:
            row.pop("attention_mask")
    return {"config": config, **found}


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("llamafactory", "transformers", "peft", "datasets", "torch", "pillow")}


def main() -> int:
    import torch

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    failed = []
    for case in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            fidelity_data.write(work / "data")
            os.environ["HF_DATASETS_CACHE"] = str(work / "cache")
            try:
                result = record(case, work)
            except Exception as error:  # LLaMA-Factory's own failure is a finding: it is recorded as such
                result = {"config": {**BASE, **CASES[case]}, "error": f"{type(error).__name__}: {error}"}
                failed.append(case)
        path = HERE / "llamafactory" / f"{case}.json"
        path.parent.mkdir(exist_ok=True)
        body = {"versions": versions(), **result}
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in body.items())
        path.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    print(f"recorded {len(sys.argv[1:] or CASES)} cases; LLaMA-Factory failed on: {failed or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
