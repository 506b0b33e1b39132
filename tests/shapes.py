"""Eight pictures of shapes and their names: what a model is trained on by rewards; tests and a benchmark share this."""

import json
import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker.protocol import Reporter
from tests.worker_tasks import training

SHAPES = ("circle", "square", "triangle", "cross", "star", "ring", "diamond", "bar")
SIDE = 64
COLUMNS = {"messages": "messages", "images": "images"}
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
RECIPE = {
    "model_name_or_path": "model", "dataset": "shapes", "template": "gemma3", "do_train": True,
    "finetuning_type": "full", "freeze_multi_modal_projector": False, "per_device_train_batch_size": 8,
    "logging_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant",
}  # fmt: skip
# so short that the model names a shape rightly now and then
BRIEFLY = {"stage": "sft", "learning_rate": 1e-3, "max_steps": 26}
REWARDED = {
    "stage": "grpo", "reward": {"label_accuracy": 1.0}, "num_generations": 8, "max_completion_length": 8,
    "learning_rate": 3e-4,
}  # fmt: skip


def picture(name: str) -> Image.Image:
    """A shape in dark blue on white."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(image)
    points = [
        (32 + radius * math.sin(k * math.pi / 5), 32 - radius * math.cos(k * math.pi / 5))
        for k in range(10)
        for radius in [10 if k % 2 else 26]
    ]
    match name:
        case "circle":
            draw.ellipse((10, 10, 54, 54), fill="navy")
        case "square":
            draw.rectangle((12, 12, 52, 52), fill="navy")
        case "triangle":
            draw.polygon([(32, 8), (56, 54), (8, 54)], fill="navy")
        case "cross":
            draw.rectangle((27, 8, 37, 56), fill="navy")
            draw.rectangle((8, 27, 56, 37), fill="navy")
        case "star":
            draw.polygon(points, fill="navy")
        case "ring":
            draw.ellipse((10, 10, 54, 54), outline="navy", width=8)
        case "diamond":
            draw.polygon([(32, 6), (56, 32), (32, 58), (8, 32)], fill="navy")
        case _:
            draw.rectangle((6, 26, 58, 38), fill="navy")
    return image


def write_shapes(folder: Path, **changes: Any) -> Path:
    """The pictures and their entry; `changes` are of the first row."""
    (folder / "images").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for name in SHAPES:
        picture(name).save(folder / "images" / f"{name}.png")
        asked = {"role": "user", "content": "<image>What is shown here?"}
        turns = [asked, {"role": "assistant", "content": name}]
        rows.append({"id": name, "messages": turns, "images": [f"images/{name}.png"], "label": name})
    rows[0] = {key: value for key, value in {**rows[0], **changes}.items() if value is not None}
    (folder / "shapes.json").write_text(json.dumps(rows))
    entry = {"file_name": "shapes.json", "formatting": "sharegpt", "columns": COLUMNS, "tags": TAGS}
    (folder / "dataset_info.json").write_text(json.dumps({"shapes": entry}))
    return folder


def trained(values: dict[str, Any], model_dir: Path, data_dir: Path, run_dir: Path) -> list[dict[str, Any]]:
    """Train, and return the lines of the log."""
    spec = TrainSpec(**{**RECIPE, **values})
    cache_dir = data_dir.parent / "cache"
    train_task(training(spec, model_dir=model_dir, data_dir=data_dir, run_dir=run_dir, cache_dir=cache_dir), Reporter())
    return [json.loads(line) for line in (run_dir / "trainer_log.jsonl").read_text().splitlines()]
