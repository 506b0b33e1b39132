"""Models learn from rows with videos, beside pictures and beside neither; cached or not, killed or not; and answer."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from mllm_assets.evaluation.predict import evaluate_task
from mllm_assets.evaluation.table import PREDICTIONS_FILE
from mllm_assets.training.caches.features import features_task
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker.protocol import Reporter
from tests import clips, tiny_families
from tests.integration.test_train_families import (
    LORA,
    losses,
    make_task,
    train_and_be_killed,
    train_counted,
)
from tests.worker_tasks import evaluation, features_of

pytest.importorskip("av")
pytestmark = pytest.mark.integration
INFO = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images", "videos": "videos"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}


def write_rows(data: Path, rows: list[tuple[str, str, list[str], list[str]]]) -> None:
    """Entries of all rows, and of those that have not both pictures and videos."""
    turns = [
        {
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}],
            "images": images,
            "videos": videos,
        }
        for asked, told, images, videos in rows
    ]
    apart = [row for row in turns if not (row["images"] and row["videos"])]
    for name, some in (("few", turns), ("apart", apart)):
        (data / f"{name}.json").write_text(json.dumps(some))
    names = {name: {**INFO, "file_name": f"{name}.json"} for name in ("few", "apart")}
    (data / "dataset_info.json").write_text(json.dumps(names))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six rows: three with a video of another length and size, two of them with a picture too, and one with neither."""
    data = tmp_path_factory.mktemp("data")
    for number, size in enumerate([(48, 32), (64, 64), (40, 24)]):
        clips.write_clip(data / f"{number}.mp4", num_frames=10 + 7 * number, fps=8, size=size, seed=number)
    Image.new("RGB", (60, 40), (200, 30, 90)).save(data / "a.png")
    write_rows(
        data,
        [
            ("<video>What moves?", "A square.", [], ["0.mp4"]),
            ("Is <image> in <video>?", "No.", ["a.png"], ["1.mp4"]),
            ("<video><video>Which is longer?", "The second.", [], ["0.mp4", "2.mp4"]),
            ("<image>What is this?", "A ground.", ["a.png"], []),
            ("1 + 1?", "2", [], []),
            ("<video>And here, beside <image>?", "A square.", ["a.png"], ["2.mp4"]),
        ],
    )
    return data


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def build(model_type: str) -> Path:
        directory = folder / model_type
        if not directory.exists():
            directory.mkdir()
            tiny_families.build(model_type, directory)
        return directory

    return build


PROJECTOR_TOO: dict[str, Any] = {
    "finetuning_type": "full", "freeze_multi_modal_projector": False, "max_steps": 4, "gradient_accumulation_steps": 1,
}  # fmt: skip
# Qwen2.5-VL represents them in `make test`: windows, and the time of each step
OTHERS = ("qwen3_vl", "qwen3_5", "smolvlm")  # Qwen2-VL and Qwen3-VL with experts are as these, and cost as much
EACH = ["qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


@pytest.mark.parametrize("model_type", EACH)
def test_cached_or_not_the_losses_are_the_same_and_the_model_answers(
    model_of: Callable[[str], Path], data_dir: Path, tmp_path: Path, model_type: str
) -> None:
    entry = "apart" if model_type == "smolvlm" else "few"  # its rows show one kind
    values = PROJECTOR_TOO | {"dataset": entry, "eval_dataset": entry}
    plain, num_plain = train_counted(make_task(model_of(model_type), data_dir, tmp_path / "plain", **values))
    task = make_task(model_of(model_type), data_dir, tmp_path / "cached", cached=True, **values)
    cached, num_cached = train_counted(task)
    assert num_plain > 0 and num_cached == 0 and cached["caches"]["vision_features"] == "cached"
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)
    assert losses(tmp_path / "cached")[-1] < losses(tmp_path / "cached")[0]
    made = features_task(features_of(task, tmp_path / "features"), Reporter())
    num_videos = 2 if entry == "apart" else 3
    assert (made.num_images, made.num_computed) == (1 + num_videos, 0), "a picture and videos, which training cached"
    asked = evaluation(
        recipe=task.recipe,
        model_dir=tmp_path / "cached" / "model",
        base_model_dir=model_of(model_type),
        data_dir=data_dir,
        directory=tmp_path / "predictions",
        features_root=tmp_path / "features",
        max_new_tokens=3,
    )
    evaluate_task(asked, Reporter())
    table = pq.read_table(tmp_path / "predictions" / PREDICTIONS_FILE).to_pylist()
    assert table[0]["prompt"] == "What moves?"
    half = len(table) // 2
    assert sum(row["loss_nats"] for row in table[half:]) < sum(row["loss_nats"] for row in table[:half]), "base, tuned"


def test_killed_and_run_again_the_weights_are_the_same_while_the_tower_trains(
    model_of: Callable[[str], Path], data_dir: Path, tmp_path: Path
) -> None:
    values = LORA | {"freeze_vision_tower": False}
    whole = train_task(make_task(model_of("qwen2_5_vl"), data_dir, tmp_path / "whole", **values), Reporter())
    task = make_task(model_of("qwen2_5_vl"), data_dir, tmp_path / "run", **values)
    assert train_and_be_killed(task, step=5) == -signal.SIGKILL
    resumed = train_task(task, Reporter())
    assert resumed["resumed_from_step"] == 3
    assert resumed["weights_digest"] == whole["weights_digest"]
