"""One training run of the benchmark, in a process of its own: `speed_worker.py REQUEST.json RESULT.json`.

`trainer` in the request is "engine" (this project), "plain" (transformers' Trainer as a user would write it), "trl"
(its SFTTrainer on the same batches) or "llamafactory"; the last two run in environments of their own.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class StepTimer(TrainerCallback):
    """CPU-seconds and wall at the end of each step, and each step's loss."""

    def __init__(self) -> None:
        self.cpu_s: list[float] = []
        self.wall_s: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.cpu_s.append(time.process_time())
        self.wall_s.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def train_with_engine(request: dict[str, Any], timer: StepTimer) -> dict[str, Any]:
    """The project's own worker task, with caches in an empty folder that it fills first."""
    from mllm_assets.training.loop import engine
    from mllm_assets.training.loop.trainer import FineTuner
    from mllm_assets.worker.protocol import Reporter

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.worker_tasks import training

    initialise = FineTuner.__init__

    def with_timer(self: FineTuner, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        self.add_callback(timer)

    FineTuner.__init__ = with_timer
    work = Path(request["work_dir"])
    recipe = {"model_name_or_path": "model", "dataset_dir": "data", **request["recipe"]}
    from mllm_assets.recipe.spec import TrainSpec

    known = set(TrainSpec.__dataclass_fields__)
    result = engine.train_task(
        training(
            TrainSpec(**{key: value for key, value in recipe.items() if key in known}),
            model_dir=Path(request["model_dir"]),
            data_dir=Path(request["data_dir"]),
            run_dir=work / "run",
            cache_dir=work / "cache",
        ),
        Reporter(),
    )
    return {"caches": result["caches"], "num_trainable_params": result["num_trainable_params"]}


def train_plainly(request: dict[str, Any], timer: StepTimer) -> dict[str, Any]:
    """transformers' Trainer on decoded images, the processor in the collator."""
    from transformers import Trainer, TrainingArguments

    model, _, collate, rows = load_plainly(request)
    args = TrainingArguments(**arguments_of(request))
    trainer = Trainer(model=model, args=args, data_collator=collate, train_dataset=rows, callbacks=[timer])  # pyright: ignore[reportArgumentType]
    trainer.train()
    return facts_of(model, collate(rows))


def train_with_trl(request: dict[str, Any], timer: StepTimer) -> dict[str, Any]:
    """TRL's SFTTrainer on the batches of the plain baseline, which it would prepare otherwise."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    model, processor, collate, rows = load_plainly(request)
    own = {"dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False, "max_length": None}
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**arguments_of(request), **own), data_collator=collate,
        train_dataset=Dataset.from_list(rows), processing_class=processor, callbacks=[timer],
    )  # fmt: skip
    trainer.train()
    return facts_of(model, collate(rows))


def arguments_of(request: dict[str, Any]) -> dict[str, Any]:
    """The keys of `TrainingArguments` that both baselines get."""
    recipe = request["recipe"]
    return {
        "output_dir": str(Path(request["work_dir"]) / "run"), "bf16": recipe["bf16"], "use_cpu": True,
        "report_to": "none", "remove_unused_columns": False, "disable_tqdm": True, "dataloader_pin_memory": False,
        **{key: recipe[key] for key in (
            "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "learning_rate",
            "lr_scheduler_type", "logging_steps", "save_strategy", "seed", "optim",
        )},
    }  # fmt: skip


def facts_of(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "num_tokens": batch["input_ids"].shape[1],
        "num_supervised": round(float((batch["labels"] >= 0).sum(1).float().mean()), 1),
    }


def load_plainly(request: dict[str, Any]) -> tuple[Any, Any, Callable[..., Any], list[dict[str, Any]]]:
    """Model, processor, collator and rows as a user would write them."""
    import torch
    from PIL import Image
    from transformers import AutoProcessor, Gemma3ForConditionalGeneration, set_seed

    recipe, data_dir = request["recipe"], Path(request["data_dir"])
    torch.set_num_threads(1)
    set_seed(recipe["seed"])
    processor = AutoProcessor.from_pretrained(request["model_dir"])
    processor.tokenizer.padding_side = "right"
    dtype = torch.bfloat16 if recipe["bf16"] else torch.float32
    model: Any = Gemma3ForConditionalGeneration.from_pretrained(
        request["model_dir"], attn_implementation="sdpa", dtype=dtype
    )
    model.config.text_config.use_cache = False
    model = freeze(model, request["case"])
    if recipe["bf16"]:
        for parameter in model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    rows = []
    for row in json.loads((data_dir / "train.json").read_text()):
        question, answer = (message["content"] for message in row["messages"])
        image = Image.open(data_dir / row["images"][0])
        image.load()
        question = question.replace("<image>", "<start_of_image>")
        prompt = f"<bos><start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n"
        rows.append({"prompt": prompt, "answer": f"{answer}<end_of_turn>\n", "image": image})

    def collate(batch: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        options = {"return_tensors": "pt", "padding": True, "pad_to_multiple_of": 8, "add_special_tokens": False}
        images = [[row["image"]] for row in batch]
        encoded = processor(text=[row["prompt"] + row["answer"] for row in batch], images=images, **options)
        num_answer = [len(processor.tokenizer.encode(row["answer"], add_special_tokens=False)) for row in batch]
        labels = encoded["input_ids"].clone()
        for index, count in enumerate(num_answer):
            end = int(encoded["attention_mask"][index].sum())
            labels[index, : end - count] = -100
            labels[index, end:] = -100
        return {**encoded, "labels": labels}

    return model, processor, collate, rows


def freeze(model: Any, case: str) -> Any:
    """What each case trains, written out."""
    if case == "LoRA":
        from peft import LoraConfig, get_peft_model
        from torch import nn

        targets = [
            name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "language_model" in name
        ]
        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    wanted = {
        "projector only": ("multi_modal_projector",),
        "last 2 layers + projector": ("multi_modal_projector", "language_model.layers.8.", "language_model.layers.9."),
        "last 2 layers only": ("language_model.layers.8.", "language_model.layers.9."),
    }[case]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in wanted))
    return model


def train_with_llamafactory(request: dict[str, Any], timer: StepTimer) -> dict[str, Any]:
    """LLaMA-Factory's own entry point on the same recipe, model and ShareGPT directory."""
    import importlib.machinery
    import types

    # It imports torchaudio whatever the data, and PyPI's does not load beside a CPU build of torch
    audio = types.ModuleType("torchaudio")
    audio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules.setdefault("torchaudio", audio)
    from llamafactory.train.tuner import run_exp  # pyright: ignore[reportMissingImports]

    work = Path(request["work_dir"])
    run_exp(
        {
            **request["recipe"],
            "model_name_or_path": request["model_dir"], "dataset_dir": request["data_dir"],
            "output_dir": str(work / "run"), "flash_attn": "sdpa", "report_to": "none", "disable_tqdm": True,
            "overwrite_cache": True, "dataloader_pin_memory": False,
        },
        callbacks=[timer],
    )  # fmt: skip
    return {}


TRAINERS: dict[str, Callable[[dict[str, Any], StepTimer], dict[str, Any]]] = {
    "engine": train_with_engine,
    "plain": train_plainly,
    "trl": train_with_trl,
    "llamafactory": train_with_llamafactory,
}


def peak_memory_mib() -> float:
    """The most that was resident at once, from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM: this benchmark needs Linux")


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    timer = StepTimer()
    facts = TRAINERS[request["trainer"]](request, timer)
    skipped = request["num_warmup_steps"]
    result = {
        **facts,
        "losses": timer.losses,
        "step_cpu_s": [b - a for a, b in zip(timer.cpu_s, timer.cpu_s[1:], strict=False)][skipped - 1 :],
        "step_wall_s": [b - a for a, b in zip(timer.wall_s, timer.wall_s[1:], strict=False)][skipped - 1 :],
        "total_cpu_s": time.process_time(),
        "peak_memory_mib": peak_memory_mib(),
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
