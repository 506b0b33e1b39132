"""Checkpoints of a run that is not finished, on another machine."""

from pathlib import Path

import pytest

from mllm_assets.artifacts import find_damage, write_json_atomic, write_manifest
from mllm_assets.errors import IntegrityError
from mllm_assets.layout import Layout
from mllm_assets.store.checkpoints import checkpoints_sent, fetch_checkpoints
from mllm_assets.store.mirror import Mirror
from mllm_assets.store.objects import Store
from mllm_assets.training.runs.run_file import RUN_FILE, read_run_file


def machine(tmp_path: Path, name: str) -> tuple[Mirror, Path]:
    layout = Layout(tmp_path / name)
    return Mirror(Store(f"file://{tmp_path}/store", layout.root), layout), layout.outputs / "mine" / "0123456789abcdef"


def write_checkpoint(run_dir: Path, step: int, content: bytes) -> None:
    directory = run_dir / f"checkpoint-{step}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "trainable.safetensors").write_bytes(content)
    write_manifest(directory, {"step": step})


def refuse(text: str) -> None:
    raise AssertionError(text)


def test_what_a_lost_machine_had_saved_is_in_the_store_and_a_run_goes_on_from_it_elsewhere(tmp_path: Path) -> None:
    here, run_dir = machine(tmp_path, "here")
    begin(run_dir)
    with pytest.raises(RuntimeError, match="lost"), checkpoints_sent(here, run_dir, refuse):
        write_checkpoint(run_dir, 4, b"four")
        write_checkpoint(run_dir, 12, b"twelve")
        (run_dir / "checkpoint-16").mkdir()  # half written
        raise RuntimeError("lost")

    there, elsewhere = machine(tmp_path, "there")
    write_checkpoint(elsewhere, 4, b"four, of an attempt of its own")
    assert fetch_checkpoints(there, elsewhere) == ["checkpoint-12"]
    assert (elsewhere / "checkpoint-12" / "trainable.safetensors").read_bytes() == b"twelve"
    assert find_damage(elsewhere / "checkpoint-12") is None
    assert read_run_file(elsewhere) == {"num_threads": 3}, "where its model lies is this machine's to say"
    assert fetch_checkpoints(there, elsewhere) == [], "it has the newest"


def begin(run_dir: Path) -> None:
    run_dir.mkdir(parents=True)
    write_json_atomic(run_dir / RUN_FILE, {"num_threads": 3, "starts_from": {"model_dir": "../../../pretrains/x"}})


def test_a_checkpoint_that_is_not_what_was_sent_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    here, run_dir = machine(tmp_path, "here")
    write_checkpoint(run_dir, 4, b"four")
    with checkpoints_sent(here, run_dir, refuse):
        pass
    [sent] = [
        path for path in (tmp_path / "store" / "objects").rglob("*") if path.is_file() and path.read_bytes() == b"four"
    ]
    sent.write_bytes(b"five")
    there, elsewhere = machine(tmp_path, "there")
    with pytest.raises(IntegrityError, match="with other bytes than were sent"):
        fetch_checkpoints(there, elsewhere)
    assert not list(elsewhere.glob("*checkpoint*"))
