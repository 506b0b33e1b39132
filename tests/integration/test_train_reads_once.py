"""Files that a training reads: each image is hashed once over all processes, and what changed is found by it."""

import builtins
import io
import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from traceback import walk_stack
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

from mllm_assets import artifacts, file_digests
from mllm_assets.artifacts import sha256_file
from mllm_assets.data.sharegpt.dataset import Dataset, listed_images
from mllm_assets.errors import IntegrityError
from mllm_assets.evaluation.in_turn import InTurn
from mllm_assets.evaluation.predict import evaluate_task
from mllm_assets.layout import Layout
from mllm_assets.recipe.load import load_recipe
from mllm_assets.training.caches.features import features_task
from mllm_assets.training.loop.engine import train_task
from mllm_assets.training.models import weight_files
from mllm_assets.training.runs.plan import plan_run
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import CacheSettings, TrainTask
from tests.integration.conftest import REPOSITORY, Project
from tests.unit.data.made_datasets import made_spec, png, run_line, write_source
from tests.worker_tasks import evaluation, features_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

# In every Python process of the test's command: which process took the sha256 of what, and opened which split file
HOOK = """
import hashlib, os, sys
wanted, log = set(open(os.environ["WANTED"]).read().split()), os.environ["READ_LOG"]

def note(*words):
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "w") as file:
        file.write(" ".join(map(str, words)) + "\\n")

class Counted:
    def __init__(self, made):
        self._made = made
    def __getattr__(self, name):
        return getattr(self._made, name)
    def _noted(self, value):
        if self._made.hexdigest() in wanted:
            note("hash", os.getpid(), self._made.hexdigest())
        return value
    def digest(self):
        return self._noted(self._made.digest())
    def hexdigest(self):
        return self._noted(self._made.hexdigest())

sha256, new = hashlib.sha256, hashlib.new
hashlib.sha256 = lambda *args, **options: Counted(sha256(*args, **options))
hashlib.new = lambda name, *args, **options: Counted(made) if (made := new(name, *args, **options)).name == "sha256" else made

def opened(event, args):
    if event == "open" and str(args[0]).endswith(("train.json", "val.json")):
        note("open", os.getpid(), args[0])

sys.addaudithook(opened)
"""  # noqa: E501


def test_each_image_is_hashed_once_over_all_processes_and_each_split_parsed_once_in_each(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was four times an image: for the run's name, in the worker, for the cache's names, and to read the cache."""
    version = (project.layout.data / "emoji").resolve()
    splits = {str(version / f"{side}.json") for side in ("train", "val")}
    named = {name for split in splits for row in json.loads(Path(split).read_text()) for name in row["images"]}
    images = {digest for name, digest in listed_images(version) if name in named}  # test's are not read
    hooks, log = tmp_path / "hooks", tmp_path / "read.log"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(HOOK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hooks), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
    split_of = {sha256_file(Path(split)): split for split in splits}
    (tmp_path / "wanted").write_text("\n".join([*images, *split_of]))
    monkeypatch.setenv("WANTED", str(tmp_path / "wanted"))
    monkeypatch.setenv("READ_LOG", str(log))
    shutil.copy(REPOSITORY / "configs" / "emoji_projector_sft.yaml", project.root / "configs")
    process = project.start_python(
        "-m", "mllm_assets.cli", "train", "configs/emoji_projector_sft.yaml", "--device", "cpu",
        "model_name_or_path=pretrains/gemma3_tiny", "max_steps=8", "max_samples=64", "report_to=none",
    )  # fmt: skip
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output

    events = [line.split(" ", 2) for line in log.read_text().splitlines()]
    hashed = Counter(what for kind, _, what in events if kind == "hash" and what in images)
    assert hashed == dict.fromkeys(images, 1), "once, and every one of them"
    parsed = Counter((pid, what) for kind, pid, what in events if kind == "open" and what in splits)
    for kind, pid, what in events:  # a file is opened to be hashed, too
        if kind == "hash" and what in split_of:
            parsed[pid, split_of[what]] -= 1
    assert len({pid for pid, _ in parsed}) == 2, "the command and its worker"
    assert set(parsed.values()) == {2}, "opened to tell its format by its beginning, and parsed once"
    assert project.run_manifest("emoji_projector_sft")["caches"]["vision_features"] == "cached"


@pytest.fixture
def published(tmp_path: Path, parity_dir: Path) -> Layout:
    """A project with a published dataset, a recipe and a model."""
    layout = Layout(tmp_path)
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
    run_line(made_spec(8, 4), layout)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "r.yaml").write_text(
        "model_name_or_path: model\ndataset: made_train\neval_dataset: made_val\ntemplate: gemma3\ndo_train: true\n"
        "output_dir: outputs/r\ndataset_dir: data\nmax_steps: 1\nuse_cpu: true\n"
    )
    (tmp_path / "model").symlink_to(parity_dir / "model")
    return layout


def task_of(layout: Layout) -> TrainTask:
    return plan_run(load_recipe(layout.root / "configs" / "r.yaml"), root=layout.root).task


def swap(path: Path) -> None:
    """Other bytes of the same size and time of change."""
    before, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_run_loads_its_base_once_and_hashes_each_file_of_base_and_model_once(
    published: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was three loads, two passes over a base without a manifest (name, run) and two over the trained model."""
    loads, hashed = Counter[Path](), Counter[Path]()
    load, sha256 = AutoModelForImageTextToText.from_pretrained, sha256_file

    def counted_load(directory: Path, **options: object) -> object:
        loads[Path(directory)] += 1
        return load(directory, **options)

    def counted_sha256(path: Path) -> str:
        hashed[path] += 1
        return sha256(path)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", counted_load)
    for module in (artifacts, file_digests):
        monkeypatch.setattr(module, "sha256_file", counted_sha256)
    values = {"max_steps": 3, "finetuning_type": "freeze", "freeze_trainable_layers": 1}
    task = plan_run(load_recipe(published.root / "configs" / "r.yaml", values), root=published.root).task
    caches = CacheSettings(features_root=published.features, hidden_states_root=published.hidden_states)
    manifest = train_task(replace(task, caches=caches), Reporter())
    assert manifest["caches"] == {"vision_features": "cached", "hidden_states": "cached below layer 3"}
    assert loads == {task.model_dir: 1, task.run_dir / "model": 1}, "what was cached is read from the files alone"
    weights = [directory / "model.safetensors" for directory in (task.model_dir, task.run_dir / "model")]
    assert [hashed[path] for path in weights] == [1, 1]


def count_opens(monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[Path], Counter[Path]]:
    """How often Python opens each file from now on: here, and inside of transformers."""
    ours, transformers, opened = Counter[Path](), Counter[Path](), io.open

    def counted(file: Any, *args: Any, **options: Any) -> Any:
        if isinstance(file, str | Path):
            callers = [frame.f_code.co_filename for frame, _ in islice(walk_stack(sys._getframe(1)), 3)]
            (transformers if any("/transformers/" in name for name in callers) else ours)[Path(file)] += 1
        return opened(file, *args, **options)

    for module in (io, builtins):
        monkeypatch.setattr(module, "open", counted)
    return ours, transformers


def test_a_line_loads_its_base_once_to_train_and_once_to_ask_base_and_tuned_model(
    published: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tuned model shares all but its projector with the base that is in memory; both were loaded and hashed."""
    monkeypatch.setattr(weight_files, "KEPT_FROM_BYTES", 1)
    loads, hashed = Counter[Path](), Counter[Path]()
    load, sha256 = AutoModelForImageTextToText.from_pretrained, sha256_file

    def counted_load(directory: Path, **options: object) -> object:
        loads[Path(directory)] += 1
        return load(directory, **options)

    def counted_sha256(path: Path) -> str:
        hashed[path] += path.suffix == ".safetensors" and published.features not in path.parents
        return sha256(path)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", counted_load)
    for module in (artifacts, file_digests):
        monkeypatch.setattr(module, "sha256_file", counted_sha256)
    ours, transformers = count_opens(monkeypatch)
    keys = {"finetuning_type": "full", "freeze_language_model": True, "freeze_multi_modal_projector": False}
    values = {"max_steps": 3, "save_strategy": "no", **keys}
    task = plan_run(load_recipe(published.root / "configs" / "r.yaml", values), root=published.root).task
    caches = CacheSettings(features_root=published.features, weights_root=published.frozen_weights)
    manifest = train_task(replace(task, caches=caches), Reporter())
    base, model = task.model_dir, task.run_dir / "model"
    frozen, own = (model / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    assert manifest["base_weights"]["linked"] == [frozen.name]
    assert loads == {base: 1, model: 1}
    assert (hashed[base / "model.safetensors"], hashed[own], hashed[frozen]) == (1, 1, 0)
    assert ours[base / "config.json"] <= 2 and ours[base / "model.safetensors"] == 2, "digest, content"
    assert transformers[base / "config.json"] <= 3, "its own, and for tokenizer and image processor"

    ask = evaluation(
        model_dir=model, base_model_dir=base, data_dir=task.data_dir, entries=["made_val"],
        directory=tmp_path / "once", features_root=published.features, max_new_tokens=2,
    )  # fmt: skip
    for counted in (loads, hashed, ours, transformers):
        counted.clear()
    asked = evaluate_task(ask, Reporter())
    once = asked.manifest
    assert str(own) in asked.model_files and str(frozen) not in asked.model_files, "for the release: what was read"
    assert loads == {base: 1}
    assert +hashed == {base / "model.safetensors": 1, own: 1}
    assert max(ours[path] for path in (base / "config.json", model / "config.json", base / "model.safetensors")) <= 2

    monkeypatch.setattr(InTurn, "announce", lambda *_: None)
    alone = evaluate_task(replace(ask, directory=tmp_path / "alone"), Reporter()).manifest
    assert loads == {base: 2, model: 1}
    assert alone["digest"] == once["digest"], "each model loaded from its own files gives the same"


@pytest.mark.parametrize("entry", ["made_train", "made_val"])
@pytest.mark.parametrize("planned", [True, False], ids=["after-the-plan", "before-the-plan"])
def test_an_image_that_changed_since_its_dataset_was_published_is_named_before_it_trains(
    published: Layout, entry: str, planned: bool
) -> None:
    image = Dataset(published.data).entry(entry).rows[0].images[0]
    if not planned:
        swap(image)
    task = task_of(published)
    if planned:
        swap(image)
    message = rf"The image .*{image.name} of entry {entry} changed after its dataset was published: .* Materialise"
    with pytest.raises(IntegrityError, match=message):
        train_task(task, Reporter())
    assert not list(task.run_dir.glob("checkpoint-*"))


def test_a_changed_image_is_named_before_features_are_made_of_it_and_before_a_model_is_asked(published: Layout) -> None:
    task = task_of(published)
    image = Dataset(published.data).entry("made_val").rows[0].images[0]
    asked = evaluation(
        model_dir=task.model_dir, data_dir=task.data_dir, directory=published.root / "said", entries=["made_val"]
    )
    swap(image)
    with pytest.raises(IntegrityError, match=rf"{image.name} of entry made_val changed after"):
        features_task(features_of(task, published.features), Reporter())
    with pytest.raises(IntegrityError, match=rf"{image.name} of entry made_val changed after"):
        evaluate_task(asked, Reporter())
    assert not published.features.exists() and not asked.directory.exists()


def test_a_changed_image_of_an_entry_that_a_person_wrote_is_found_too(published: Layout) -> None:
    """Nothing recorded what its images held, so the entry is named."""
    for side in ("train", "val"):
        shutil.copy(published.data / "made" / f"{side}.json", published.data / f"mine_{side}.json")
    text = published.dataset_info.read_text()
    published.dataset_info.write_text(text.replace('"made/', '"mine_'))
    task = task_of(published)
    assert Dataset(published.data).entry("made_train").recorded == {}
    swap(Dataset(published.data).entry("made_train").rows[0].images[0])
    with pytest.raises(IntegrityError, match=r"The entry made_train in .* changed after this run was named"):
        train_task(task, Reporter())
