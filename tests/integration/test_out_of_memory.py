"""Memory that ends outside of a training step, as on a card that other programs fill: told with what to lower."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import OutOfMemoryError
from mllm_assets.inference.answerer import Answerer
from mllm_assets.training.loop import folds, preferences
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker.fold_task import FoldsTask
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import TrainTask
from tests.integration.test_train_guards import make_task
from tests.integration.test_train_preferences import spec_of
from tests.worker_tasks import ONE_CPU_THREAD, training

pytestmark = pytest.mark.integration
QUESTION = {"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 4}


def memory_ends(*_: Any, **__: Any) -> None:
    """As PyTorch says it on a card."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def learning_pairs(parity_dir: Path, folder: Path) -> TrainTask:
    config = json.loads((parity_dir / "reference" / "dpo_lora.json").read_text())["config"]
    spec = spec_of(config, folder, max_steps=1)
    return training(spec, model_dir=parity_dir / "model", data_dir=parity_dir / "data", run_dir=folder / "run")


def test_a_model_that_is_put_on_a_full_device_is_told(
    parity_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback, where nothing is cached: until then the model is in main memory."""
    monkeypatch.setattr(Trainer, "_move_model_to_device", memory_ends)
    with pytest.raises(OutOfMemoryError, match=r"^Out of memory while the model was put on the device: CUDA out of "):
        train_task(make_task(parity_dir, tmp_path / "run"), Reporter())


def test_a_reference_that_is_asked_about_too_many_rows_is_told(
    parity_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback: it is asked before the first step, about as many rows as are evaluated at once."""
    monkeypatch.setattr(preferences, "token_losses", memory_ends)
    with pytest.raises(OutOfMemoryError, match=r"^Out of memory while the reference .* 2 rows at once: lower per_dev"):
        train_task(learning_pairs(parity_dir, tmp_path), Reporter())


def test_rows_of_a_fold_that_are_too_many_at_once_are_told(
    parity_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback, after the fold's model was trained."""
    monkeypatch.setattr(folds, "sequence_logps", memory_ends)
    run = make_task(parity_dir, tmp_path / "run", max_steps=1, max_samples=4, eval_strategy="no")
    ids = [row.id for row in Dataset(parity_dir / "data").entry("gemma3_vlm_train").rows[:4]]
    task = FoldsTask(
        run=run, directory=tmp_path / "folds", folds={row_id: number % 2 for number, row_id in enumerate(ids)},
        asked=tuple(ids), accelerator=ONE_CPU_THREAD,
    )  # fmt: skip
    with pytest.raises(OutOfMemoryError, match=r"^Out of memory while the rows of a fold .* per_device_eval_batch_siz"):
        folds.folds_task(task, Reporter())


def test_a_client_whose_question_does_not_fit_is_told_and_the_next_one_is_answered(
    parity_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was "The server failed; its log says why", which a client cannot read."""
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    from mllm_assets.inference import chat_handler, serving

    answerer = Answerer(parity_dir / "model")
    model = chat_handler.OneModel("m", parity_dir / "model", answerer, serving._complete_processor(answerer))
    answers = chat_handler.AnswerManager(answerer, answer_s=500)
    chat = chat_handler.ChatHandler(
        model, serving.GenerationState(), answerer, answers, max_new_tokens=8, limits=serving.Limits()
    )

    async def told(**more: Any) -> tuple[int, str]:
        try:
            response = await chat.handle_request({**QUESTION, **more}, "r")
            parts = [part async for part in response.body_iterator] if more else [bytes(response.body)]
            return response.status_code, str(parts)
        except serving.RequestError as error:
            return error.status_code, error.detail
        finally:
            async with chat._turn:  # its thread has ended this request's work
                pass

    async def ask() -> None:
        serving.CLIENT_GONE.set(threading.Event())
        with monkeypatch.context() as full:
            full.setattr(answerer.model, "generate", memory_ends)
            found = [await told(), await told(stream=True)]
        assert [status for status, _ in found] == [503, 200]
        for _, text in found:
            assert "Out of memory while a request was answered: CUDA out of memory" in text
            assert "Send fewer or smaller images" in text
        assert (await told())[0] == 200

    asyncio.run(ask())
