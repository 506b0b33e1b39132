"""What a step costs, counted instead of timed; and what happens where it does not fit."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from mllm_assets.artifacts import sha256_file
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.training.caches.shards import probes
from mllm_assets.training.encoding import encode, image_files
from mllm_assets.training.encoding.texts import TextTokenizer
from mllm_assets.training.loop.engine import NUM_RELOAD_ROWS, train_task
from mllm_assets.training.loop.trainer import FineTuner
from mllm_assets.training.models.load import load_processor
from mllm_assets.training.runs.run_file import RUN_FILE
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import TrainTask, to_json
from tests.integration.test_train_hidden_states import losses, make_task

pytestmark = pytest.mark.integration

PROJECTOR = {"finetuning_type": "full", "freeze_language_model": True, "freeze_multi_modal_projector": False}


class Counts:
    """Calls while a run trains: by module in steps, of the tokenizer and the image decoder in all."""

    def __init__(self) -> None:
        self.in_steps: Counter[str] = Counter()
        self.tokenized: Counter[str] = Counter()
        self.decoded: Counter[Path] = Counter()
        self.logit_rows: set[int] = set()

    def train(self, task: TrainTask) -> dict[str, Any]:
        step, load_image, tokens = FineTuner.training_step, image_files.load_image, TextTokenizer._read

        def counted_step(trainer: FineTuner, *args: Any, **kwargs: Any) -> torch.Tensor:
            hook = nn.modules.module.register_module_forward_pre_hook(self._count)
            try:
                return step(trainer, *args, **kwargs)
            finally:
                hook.remove()

        def counted_load(path: Path, **kwargs: Any) -> Any:
            self.decoded[path] += 1
            return load_image(path, **kwargs)

        def counted_tokens(texts: TextTokenizer, text: str) -> Sequence[int]:
            self.tokenized[text] += 1
            return tokens(texts, text)

        with (
            patch.object(FineTuner, "training_step", counted_step),
            patch("mllm_assets.training.encoding.collate.load_image", counted_load),
            patch.object(TextTokenizer, "_read", counted_tokens),
        ):
            return train_task(task, Reporter())

    def _count(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        name = type(module).__name__
        self.in_steps[name] += 1
        if name == "_NoHead":
            self.logit_rows.add(arguments[0].numel() // arguments[0].shape[-1])


def rows_of(parity_dir: Path) -> list[Row]:
    return Dataset(parity_dir / "data").entry("gemma3_vlm_train").rows


def test_a_cached_run_decodes_each_image_once_and_runs_no_tower(parity_dir: Path, tmp_path: Path) -> None:
    counts = Counts()
    result = counts.train(make_task(parity_dir, tmp_path, **PROJECTOR, eval_strategy="no"))
    assert result["caches"]["vision_features"] == "cached"
    assert counts.in_steps["SiglipVisionModel"] == counts.in_steps["SiglipEncoderLayer"] == 0
    assert counts.in_steps["CachedTower"] == result["num_steps"] == 16
    # beside: three rows are computed afresh to compare, and a batch of two checks what was published
    rows = rows_of(parity_dir)
    with_images = [row for row in rows if row.images]
    compared = [image for row in [*probes(with_images), *rows[:NUM_RELOAD_ROWS]] for image in row.images]
    different = {sha256_file(image) for row in rows for image in row.images}
    assert sum(counts.decoded.values()) == len(different) + len(compared)


def test_logits_are_computed_for_supervised_tokens_only(parity_dir: Path, tmp_path: Path) -> None:
    counts = Counts()
    counts.train(make_task(parity_dir, tmp_path, **PROJECTOR, max_steps=1, per_device_train_batch_size=48))
    encoder = encode.Encoder(load_processor(parity_dir / "model"))
    encoded = [encoder.encode(row) for row in rows_of(parity_dir)]
    assert counts.logit_rows == {sum(label >= 0 for row in encoded for label in row.labels)}
    assert len(encoded) == 48 and counts.in_steps["_NoHead"] == 1


def test_each_text_is_tokenised_once(parity_dir: Path, tmp_path: Path) -> None:
    """In however many epochs, and in however many rows: questions and labels recur."""
    counts = Counts()
    result = counts.train(make_task(parity_dir, tmp_path, **PROJECTOR, eval_strategy="no"))
    num_answers = sum(message.role == "assistant" for row in rows_of(parity_dir) for message in row.messages)
    assert result["num_epochs"] > 1
    questions = [count for text, count in counts.tokenized.items() if "<start_of_turn>user" in text]
    answers = [count for text, count in counts.tokenized.items() if text.endswith("<end_of_turn>\n")]
    assert set(questions) == set(answers) == {1}
    assert len(questions) < num_answers and len(answers) <= num_answers


def test_regrouped_micro_batches_train_the_same_samples_and_keep_their_size(parity_dir: Path, tmp_path: Path) -> None:
    values = {**PROJECTOR, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 4}
    task = make_task(parity_dir, tmp_path, **values, eval_strategy="no")
    result = train_task(replace(task, regroup=True), Reporter())
    assert result["recipe"]["per_device_train_batch_size"] == 4
    assert result["recipe"]["gradient_accumulation_steps"] == 1
    assert json.loads((tmp_path / "run" / RUN_FILE).read_text())["per_device_train_batch_size"] == 4
    train_task(make_task(parity_dir, tmp_path / "plain", **values, eval_strategy="no"), Reporter())
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "plain"), abs=0.5)


def test_the_memory_estimate_is_said_before_anything_loads_with_what_would_fit(
    parity_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {**PROJECTOR, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 1}
    train_task(make_task(parity_dir, tmp_path, **values, eval_strategy="no"), Reporter(stream=sys.stdout))
    said = capsys.readouterr().out
    assert "memory: about 0.0" in said and "micro-batches of 1 x 4; micro-batches of 4 x 1 would fit" in said


OUT_OF_MEMORY = """
import json, resource, sys
from pathlib import Path
from mllm_assets.errors import OutOfMemoryError
from mllm_assets.training.loop import engine
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import from_json
from mllm_assets.training.loop.trainer import FineTuner

step = FineTuner.training_step

def step_with_little_room(self, *args, **kwargs):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**21, resource.RLIM_INFINITY))
    return step(self, *args, **kwargs)

FineTuner.training_step = step_with_little_room
try:
    engine.train_task(from_json(json.loads(sys.argv[1])), Reporter())
except OutOfMemoryError as error:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print("refused:", error)
"""


def test_a_step_that_does_not_fit_names_the_setting(parity_dir: Path, tmp_path: Path) -> None:
    """A real allocation fails: the process may take two MiB more than it has when the step begins."""
    task = make_task(parity_dir, tmp_path, per_device_train_batch_size=48, max_steps=1, eval_strategy="no")
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, json.dumps(to_json(task))],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert "refused: Out of memory in step 1: " in done.stdout, done.stdout + done.stderr
    assert "per_device_train_batch_size is 48: set it to 24 and gradient_accumulation_steps to 2" in done.stdout
