"""A published model whose bytes changed is noticed by whoever starts from it, and is written anew without training."""

from dataclasses import replace
from pathlib import Path

import pytest

from mllm_assets.errors import IntegrityError
from mllm_assets.training.loop.engine import train_task
from mllm_assets.training.runs.models import find_run_damage, model_fingerprint, reopen_run
from mllm_assets.worker.protocol import Reporter
from tests.interruption import make_task

pytestmark = pytest.mark.integration


def test_a_flipped_bit_is_refused_by_the_next_run_and_mended_as_the_message_says(
    parity_dir: Path, tmp_path: Path
) -> None:
    """One bit of the weights: nothing fails to load, and the next stage trains on something else."""
    first, second = tmp_path / "first", tmp_path / "second"
    task = make_task(parity_dir, first, max_steps=2, save_steps=1, eval_strategy="no")
    trained = train_task(task, Reporter())
    weights = first / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    start = {"model_dir": first / "model", "pretrained_fingerprint": model_fingerprint(first / "model")}
    with pytest.raises(IntegrityError, match=r"first/model/model.safetensors does not match its digest"):
        train_task(replace(make_task(parity_dir, second, max_steps=1), **start), Reporter())
    assert not (second / "model").exists()
    assert find_run_damage(first) == "model/model.safetensors does not match its digest"

    reopen_run(first)
    again = train_task(task, Reporter())
    assert find_run_damage(first) is None
    assert (again["resumed_from_step"], again["weights_digest"]) == (2, trained["weights_digest"])
    assert weights.read_bytes() == whole
