"""Record what LLaMA-Factory itself computes from pairs and marked answers, into tests/golden/preferences/<case>.json.

Run it as record_llamafactory.py, in that file's environment, on the model and the rows of tests/golden/parity.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import record_llamafactory as sft  # first: it stands in for torchaudio

BASE: dict[str, Any] = {
    "stage": "dpo", "do_train": True, "template": "gemma3", "finetuning_type": "full", "freeze_vision_tower": True,
    "freeze_multi_modal_projector": False, "freeze_language_model": False, "dataset": "rank", "cutoff_len": 512,
    "per_device_train_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1,
    "max_steps": 8, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False,
    "seed": 42,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "projector": {"freeze_language_model": True, "pref_beta": 0.5},
    "smoothed_ftx": {"pref_ftx": 0.3, "dpo_label_smoothing": 0.1, "gradient_accumulation_steps": 2, "seed": 7},
    "cut": {"cutoff_len": 84, "per_device_train_batch_size": 3},
    "orpo": {"pref_loss": "orpo"},
    "simpo": {"pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 0.7},
    "lora": {"finetuning_type": "lora", "freeze_multi_modal_projector": True, "lora_dropout": 0.3, "lora_rank": 4},
    "kto_weights": {
        "stage": "kto",
        "dataset": "kto",
        "kto_chosen_weight": 1.3,
        "kto_rejected_weight": 0.6,
        "pref_ftx": 0.2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 3,
        "pref_beta": 0.3,
        "learning_rate": 4e-3,
    },
    "kto_cut": {
        "stage": "kto",
        "dataset": "kto",
        "cutoff_len": 84,
        "preprocessing_batch_size": 7,
        "preprocessing_num_workers": 2,
        "val_size": 0.2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "per_device_eval_batch_size": 3,
        "learning_rate": 4e-3,
        "freeze_language_model": True,
        "pref_beta": 1.0,
    },
    "rm_lora": {
        "stage": "rm",
        "finetuning_type": "lora",
        "freeze_multi_modal_projector": True,
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "max_steps": 20,
        "seed": 5,
    },
    # LLaMA-Factory fails to save it afterwards: embeddings and output layer are one tensor
    "rm_full": {
        "stage": "rm",
        "val_size": 0.25,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 10,
    },
    "evaluated": {"val_size": 0.25, "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 3},
}


def record(case: str, work: Path) -> dict[str, Any]:
    """Train one case and return what was logged and how the rows were encoded."""
    from llamafactory.train.dpo import workflow as dpo
    from llamafactory.train.kto import workflow as kto
    from llamafactory.train.rm import workflow as rm
    from llamafactory.train.tuner import run_exp

    found: dict[str, Any] = {}
    config = {**BASE, **CASES[case]}
    place, name = {
        "dpo": (dpo, "CustomDPOTrainer"), "kto": (kto, "CustomKTOTrainer"), "rm": (rm, "PairwiseTrainer"),
    }[config["stage"]]  # fmt: skip
    original: Any = getattr(place, name)

    class Recording(original):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            kept = ("input_ids", "labels", "kto_tags")
            found["rows"] = [{key: row[key] for key in row if key.endswith(kept)} for row in self.train_dataset]
            result = super().train(*args, **kwargs)
            found["logs"] = [log for log in self.state.log_history if "loss" in log or "eval_loss" in log]
            return result

    setattr(place, name, Recording)
    places = {
        "model_name_or_path": str(sft.HERE / "parity" / "model"),
        "dataset_dir": str(sft.HERE / "parity" / "data"),
        "output_dir": str(work / case),
        "overwrite_cache": True,
    }
    try:
        run_exp(args={**config, **places})
    except RuntimeError:
        if config["stage"] != "rm" or "logs" not in found:
            raise
    finally:
        setattr(place, name, original)
    return {"config": config, **found}


def main() -> int:
    import torch

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for case in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "cache")
            result = record(case, Path(folder))
        path = sft.HERE / "preferences" / f"{case}.json"
        path.parent.mkdir(exist_ok=True)
        body = {"versions": sft.versions(), **result}
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in body.items())
        path.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
