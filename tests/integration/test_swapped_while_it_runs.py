"""Files that change while they are used, with their size and time of modification kept: what was read is what is named.

The runs are real worker processes, stopped by SIGSTOP, so that the change comes at a known moment.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mllm_assets.artifacts import is_complete, sha256_file
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.errors import IntegrityError
from mllm_assets.evaluation.predict import evaluate_task
from mllm_assets.file_digests import FileDigests
from mllm_assets.layout import Layout
from mllm_assets.training.caches.features import features_task
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import Task, TrainTask, to_json
from tests.interruption import CASES, make_task
from tests.unit.data.made_datasets import made_spec, png, write_source
from tests.worker_tasks import evaluation, features_of

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.attack("swapped data"), pytest.mark.timeout(1200)]


def swap(path: Path) -> bytes:
    """Write other bytes of the same size and time of modification; return those that were there."""
    before, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return content


@contextmanager
def stopped(task: Task[Any], folder: Path, reached: Callable[[], bool]) -> Iterator[subprocess.Popen[str]]:
    """A real worker that is stopped at a moment; it goes on after the block."""
    folder.mkdir(exist_ok=True)
    (folder / "task.json").write_text(json.dumps(to_json(task)))
    command = [sys.executable, "-m", "mllm_assets.worker", str(folder / "task.json"), str(folder / "result.json")]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True)
        try:
            deadline = time.monotonic() + 240
            while not reached():
                assert process.poll() is None and time.monotonic() < deadline, (folder / "output.txt").read_text()
                time.sleep(0.002)
            process.send_signal(signal.SIGSTOP)
            yield process
            process.send_signal(signal.SIGCONT)
            process.wait(300)
        finally:
            process.kill()


def error_of(folder: Path) -> str:
    result = json.loads((folder / "result.json").read_text())
    assert "error" in result, f"it went through: {result}"
    assert result["error"]["type"] == "IntegrityError", result["error"]
    return result["error"]["message"]


@pytest.fixture
def place(parity_dir: Path, tmp_path: Path) -> Path:
    """A model and a dataset of one's own."""
    for name in ("model", "data"):
        shutil.copytree(parity_dir / name, tmp_path / name)
    return tmp_path


def short_task(place: Path, **overrides: Any) -> TrainTask:
    values = {"max_steps": 8, "save_steps": 2, "eval_strategy": "no", "dataloader_num_workers": 0, **overrides}
    return make_task(place, place / "run", **values)


def pictures(place: Path) -> list[Path]:
    return sorted(path for path in (place / "data").rglob("*") if path.suffix in (".png", ".jpg"))


CHANGED: dict[str, Callable[[Path], list[Path]]] = {
    "all-pictures": pictures,
    "rows": lambda place: sorted((place / "data").glob("*train*.json")),
    "weights": lambda place: sorted((place / "model").glob("*.safetensors")),
    "tokenizer": lambda place: [place / "model" / "tokenizer.json"],
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_a_run_reads_and_is_swapped_while_it_trains_is_named_and_nothing_is_published(
    place: Path, what: str
) -> None:
    """It ended with exit 0, other weights under the same name, and was "finished already" for good."""
    task, files = short_task(place), CHANGED[what](place)
    assert files
    with stopped(task, place / "job", lambda: is_complete(task.run_dir / "checkpoint-4")):
        contents = {path: swap(path) for path in files}
    message = error_of(place / "job")
    named = next(path for path in files if str(path) in message)
    assert f"found {sha256_file(named)[:12]}" in message and "Put back what was there and start again" in message
    assert not is_complete(task.run_dir) and not (task.run_dir / "model").exists()

    for path, content in contents.items():
        path.write_bytes(content)
    manifest = train_task(task, Reporter())
    assert manifest["resumed_from_step"] >= 4, "what was saved before the swap is used"
    again = train_task(make_task(place, place / "reference", **task_values(task)), Reporter())
    assert manifest["weights_digest"] == again["weights_digest"], "as if nothing had happened"


def task_values(task: TrainTask) -> dict[str, Any]:
    names = ("max_steps", "save_steps", "eval_strategy", "dataloader_num_workers")
    return {name: getattr(task.recipe, name) for name in names}


@pytest.mark.parametrize("case", ["cached_features", "cached_hidden_states"])
def test_a_cached_shard_that_is_swapped_while_it_trains_is_named(place: Path, case: str) -> None:
    values = {**CASES[case], "max_steps": 12, "max_samples": 8, "save_steps": 2}
    task = make_task(place, place / "run", cache_dir=place / "cache", **values)
    with stopped(task, place / "job", lambda: is_complete(task.run_dir / "checkpoint-2")):
        shards = sorted((place / "cache" / case.removeprefix("cached_")).glob("*/*/*.safetensors"))
        assert shards
        contents = {path: swap(path) for path in shards}
    assert any(str(path) in error_of(place / "job") for path in shards)
    assert not is_complete(task.run_dir) and not (task.run_dir / "model").exists()
    for path, content in contents.items():
        path.write_bytes(content)
    assert train_task(task, Reporter())["num_steps"] == 12


class Swapping(Reporter):
    """Swaps files once a stage has done something."""

    def __init__(self, stage: str, files: list[Path]) -> None:
        super().__init__()
        self._stage, self._files, self.contents = stage, files, dict[Path, bytes]()

    def progress(self, stage: str, done: int, total: int, **facts: Any) -> None:
        if stage == self._stage and not self.contents:
            self.contents = {path: swap(path) for path in self._files}


@pytest.mark.parametrize("what", ["pictures", "weights"])
def test_what_vision_features_are_made_of_and_is_swapped_is_named(place: Path, what: str) -> None:
    """On a CPU weights are mapped from their file: what was written into it went into the features of the old ones."""
    files = pictures(place) if what == "pictures" else CHANGED["weights"](place)
    task = features_of(short_task(place), place / "features")
    reporter = Swapping("vision_features", files)
    with pytest.raises(IntegrityError) as caught:
        features_task(task, reporter)
    assert any(str(path) in str(caught.value) for path in files)
    for path, content in reporter.contents.items():
        path.write_bytes(content)
    again = features_task(task, Reporter())
    fresh = features_task(features_of(short_task(place), place / "fresh"), Reporter())
    assert again.digest == fresh.digest and again.num_images == fresh.num_images
    names = [sorted((place / root).rglob("tensors.safetensors")) for root in ("features", "fresh")]
    mine = [path for path in names[0] if again.directory in str(path)]
    assert {sha256_file(path) for path in mine} == {sha256_file(path) for path in names[1]}


@pytest.fixture(scope="module")
def finished(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its checkpoints, its model and its data."""
    place = tmp_path_factory.mktemp("finished")
    for name in ("model", "data"):
        shutil.copytree(parity_dir / name, place / name)
    train_task(short_task(place, max_steps=2), Reporter())
    return place


ASKED = {
    "all-pictures": pictures,
    "rows": lambda place: sorted((place / "data").glob("*val*.json")),
    "tuned-weights": lambda place: sorted((place / "run" / "model").glob("*.safetensors")),
    "base-weights": CHANGED["weights"],
}


@pytest.mark.parametrize("stage", ["base", "tuned"])
@pytest.mark.parametrize("what", ASKED)
def test_what_predictions_read_and_is_swapped_while_they_are_made_is_named(
    finished: Path, tmp_path: Path, what: str, stage: str
) -> None:
    """Predictions of other weights and pictures had the name of the right ones, and were "there already" for good."""
    files = ASKED[what](finished)
    task = evaluation(
        model_dir=finished / "run" / "model", base_model_dir=finished / "model", data_dir=finished / "data",
        directory=tmp_path / "predictions", max_samples=2, max_new_tokens=2, batch_size=1,
    )  # fmt: skip
    reporter = Swapping(f"evaluate {stage} model", files)
    with pytest.raises(IntegrityError) as caught:
        evaluate_task(task, reporter)
    assert any(str(path) in str(caught.value) for path in files)
    assert not task.directory.exists()
    for path, content in reporter.contents.items():
        path.write_bytes(content)
    assert evaluate_task(task, Reporter()).manifest["num_predictions"] == 4


def test_a_checkpoint_that_is_swapped_while_it_is_asked_is_named(finished: Path, tmp_path: Path) -> None:
    checkpoint = finished / "run" / "checkpoint-2"
    task = evaluation(
        model_dir=checkpoint, base_model_dir=finished / "model", data_dir=finished / "data",
        directory=tmp_path / "predictions", max_samples=2, max_new_tokens=2,
    )  # fmt: skip
    reporter = Swapping("evaluate tuned model", [checkpoint / "trainable.safetensors"])
    with pytest.raises(IntegrityError, match=r"checkpoint-2/trainable.safetensors \(expected digest \w{12}, found \w"):
        evaluate_task(task, reporter)
    for path, content in reporter.contents.items():
        path.write_bytes(content)
    assert not task.directory.exists()


INGEST = """
import sys
from pathlib import Path
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.errors import MllmAssetsError
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import made_spec
try:
    ingest(made_spec(source=SourceSpec(kind=sys.argv[2], path=sys.argv[3])), Layout(Path(sys.argv[1])))
except MllmAssetsError as error:
    sys.exit(f"{type(error).__name__} {error}")
"""


@pytest.mark.parametrize("kind", ["image_folder", "parquet"])
def test_a_source_that_is_swapped_while_it_is_ingested_is_named_and_nothing_is_kept(tmp_path: Path, kind: str) -> None:
    """Half of the rows were from before and half from after, under the name of neither."""
    contents = [png(seed, 256) for seed in range(8)]
    if kind == "parquet":
        files = [tmp_path / write_source(tmp_path, [(contents[n % 8], f"picture {n}") for n in range(20_000)])]
    else:
        (tmp_path / "source").mkdir()
        files = [tmp_path / "source" / f"{n:05d}.png" for n in range(3000)]
        for n, path in enumerate(files):
            path.write_bytes(contents[n % 8] + str(n).encode())
    layout = Layout(tmp_path)
    path = files[0].name if kind == "parquet" else "source"
    process = subprocess.Popen(
        [sys.executable, "-c", INGEST, str(tmp_path), kind, path], stderr=subprocess.PIPE, text=True
    )
    parent = layout.raw("made", "x").parent
    while not any(found.stat().st_size > 1000 for found in parent.glob(".*.tmp/samples.parquet")):
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGSTOP)
    content = swap(files[-1])
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=500)
    assert process.returncode == 1, said
    assert said.startswith("DataError source.path") and files[-1].name in said and "changed while it was read" in said
    assert not list(parent.glob("[!.]*")) and not list(parent.glob(".*.tmp"))
    files[-1].write_bytes(content)
    again = ingest(made_spec(source=SourceSpec(kind=kind, path=path)), layout)
    assert again.num_samples == (3000 if kind == "image_folder" else 20_000)


def test_a_picture_that_is_swapped_and_put_back_between_two_checks_is_found_where_it_is_read(place: Path) -> None:
    """What it is at the end does not say what it was when it was read."""
    from mllm_assets.data.sharegpt.dataset import Dataset
    from mllm_assets.training.encoding.inputs import make_collator, make_encoder
    from mllm_assets.training.models.load import load_processor

    spec, processor = short_task(place).recipe, load_processor(place / "model")
    dataset = Dataset(place / "data")
    entry = dataset.entry("gemma3_vlm_train")
    entry.require_unchanged()
    row = make_encoder(spec, processor, place / "model").encode(next(row for row in entry.rows if row.images))
    collator = make_collator(spec, processor, dataset.digests)
    collator([row])
    content = swap(row.images[0])
    with pytest.raises(IntegrityError, match=rf"{row.images[0].name} \(expected digest"):
        collator([row])
    row.images[0].write_bytes(content)
    collator([row])
    dataset.digests.require_unchanged()


def test_a_file_is_hashed_again_only_where_it_was_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of many GiB is read once in a run, however often it is looked at."""
    read: list[Path] = []
    monkeypatch.setattr("mllm_assets.file_digests.sha256_file", lambda path: read.append(path) or sha256_file(path))
    digests, paths = FileDigests(), [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(b"content")
        digests.of(path)
    digests.require_unchanged()
    assert read == paths
    os.link(paths[0], tmp_path / "release")  # as a release takes a model's weights
    digests.require_unchanged()
    assert read == [*paths, paths[0]]
    paths[1].unlink()
    with pytest.raises(IntegrityError, match=rf"{paths[1]} \(expected digest \w{{12}}, found no file\)"):
        digests.require_unchanged()
