"""What a run publishes of a large model: what did not train is its base's, and costs no space."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mllm_assets import file_digests
from mllm_assets.artifacts import sha256_file
from mllm_assets.errors import IntegrityError
from mllm_assets.file_digests import FileDigests
from mllm_assets.layout import Layout
from mllm_assets.operations.gc import Policy, find_garbage
from mllm_assets.operations.repair import find_damages
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.models import freezing, frozen_weights, weight_files
from mllm_assets.training.models.load import load_model, load_processor
from mllm_assets.training.models.publishing import publish_model
from mllm_assets.training.models.weight_files import Sharing
from tests.google_layout import FIRST, INDEX, SECOND, in_google_layout, tensors_of

PROJECTOR = {"finetuning_type": "full", "freeze_language_model": True, "freeze_multi_modal_projector": False}
LORA = {"finetuning_type": "lora", "lora_rank": 2, "lora_target": "q_proj"}
pytestmark = pytest.mark.not_fast
NUM_BYTES_OF_TEXTS = 200_000  # tokenizer, configuration, index


@pytest.fixture(scope="module")
def base(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_google_layout(parity_dir / "model", tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the frozen parts, of files of any size."""
    monkeypatch.setattr(weight_files, "KEPT_FROM_BYTES", 1)
    return Layout(tmp_path).frozen_weights


def publish(
    base: Path, run_dir: Path, dtype: torch.dtype | None = None, kept: Path | None = None, **recipe: Any
) -> dict[str, torch.Tensor]:
    """Publish a model whose projector moved, or what `recipe` trains, and return it by the names in its files."""
    run_dir.mkdir(exist_ok=True, parents=True)
    spec = TrainSpec(model_name_or_path="m", dataset="d", template="gemma3", do_train=True, **(recipe or PROJECTOR))
    shape = freezing.apply(spec, load_model(base, dtype=dtype))
    with torch.no_grad():
        for parameter in shape.model.parameters():
            if parameter.requires_grad:
                parameter += 1e-3
    ids = torch.full((1, 12), 20)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    sharing = Sharing(trained=shape.names, kept=kept, digests=FileDigests())
    publish_model(shape.model, load_processor(base), run_dir, base, batch, sharing=sharing)
    return tensors_of(run_dir / "model")


def num_written() -> int:
    """Bytes that this process has handed to write calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar:"))


def moved(published: dict[str, torch.Tensor], base: Path) -> set[str]:
    originals = tensors_of(base)
    assert published.keys() == originals.keys()
    return {name for name in originals if not torch.equal(published[name], originals[name])}


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="counts by Linux's /proc")
def test_a_file_in_which_nothing_trained_is_linked_and_not_written(base: Path, tmp_path: Path) -> None:
    """A projector of 12 MB wrote 8.6 GB of gemma-3-4b once more."""
    before = num_written()
    published = publish(base, tmp_path)
    assert num_written() - before < (base / FIRST).stat().st_size + NUM_BYTES_OF_TEXTS
    assert (tmp_path / "model" / INDEX).read_bytes() == (base / INDEX).read_bytes()
    names = moved(published, base)
    assert names and all("projector" in name for name in names)
    # what is published again has taken the place of the name, not of the base's bytes
    untouched = (base / SECOND).read_bytes()
    publish(base, tmp_path)
    shutil.rmtree(tmp_path / "model")
    assert (base / SECOND).read_bytes() == untouched


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="counts by Linux's /proc")
@pytest.mark.parametrize("num_files", [1, 2])
def test_from_the_second_run_on_only_what_trained_is_written(
    base: Path, parity_dir: Path, tmp_path: Path, kept: Path, num_files: int
) -> None:
    """Whether the base is one file or several; the projector shares its file with most of the model."""
    source = parity_dir / "model" if num_files == 1 else base
    first = publish(source, tmp_path / "first", kept=kept)
    before = num_written()
    second = publish(source, tmp_path / "second", kept=kept)
    projector = sum(tensor.nbytes for name, tensor in second.items() if "projector" in name)
    assert num_written() - before < projector + NUM_BYTES_OF_TEXTS
    names = moved(second, source)
    assert names and all("projector" in name for name in names)
    assert all(torch.equal(first[name], second[name]) for name in first)
    files = sorted(path.name for path in (tmp_path / "second" / "model").glob("*.safetensors"))
    assert files == [f"model-0000{n}-of-0000{num_files + 1}.safetensors" for n in range(1, num_files + 2)]
    loader: Any = AutoModelForImageTextToText
    _, info = loader.from_pretrained(tmp_path / "second" / "model", output_loading_info=True, local_files_only=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    # a next stage finds most of its base in a file of its own
    third = publish(tmp_path / "second" / "model", tmp_path / "third", kept=kept, **LORA)
    names = moved(third, tmp_path / "second" / "model")
    assert names and all("q_proj" in name for name in names)


def test_a_kept_part_that_is_damaged_is_replaced_by_the_next_run_and_named_by_the_doctor(
    base: Path, tmp_path: Path, kept: Path
) -> None:
    whole = publish(base, tmp_path / "first", kept=kept)
    [part] = kept.glob("*/*/frozen.safetensors")
    tensors = load_file(part)
    next(tensor for name, tensor in tensors.items() if name.endswith("fc1.bias")).view(torch.int32)[7] ^= 1
    part.unlink()  # of the run's model it is another name
    save_file(tensors, part, metadata={"format": "pt"})
    assert [found.wrong for found in find_damages(Layout(tmp_path))] == [f"{part.name} does not match its digest"]
    with pytest.raises(IntegrityError, match=r"^1 of \d+ tensors have other bits after reloading .*fc1\.bias\. Run"):
        publish(base, tmp_path / "second", kept=kept)
    again = publish(base, tmp_path / "second", kept=kept)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_deleting_a_kept_part_that_nothing_uses_leaves_the_models_that_have_it(
    base: Path, tmp_path: Path, kept: Path
) -> None:
    whole = publish(base, tmp_path / "first", kept=kept)
    old = Policy(older_than_s=-1.0)
    [garbage] = [item for item in find_garbage(Layout(tmp_path), old).garbage if item.kind == "frozen weights"]
    shutil.rmtree(garbage.path)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors_of(tmp_path / "first" / "model").items())


def test_a_part_has_the_bytes_of_its_tensors_and_is_read_only(base: Path, tmp_path: Path) -> None:
    originals = load_file(base / FIRST)
    names = sorted(originals)[::2]
    part = frozen_weights.frozen_part(base / FIRST, names, tmp_path, FileDigests())
    taken = load_file(part)
    assert sorted(taken) == names and all(torch.equal(taken[name], originals[name]) for name in names)
    assert part.stat().st_mode & 0o222 == 0


def test_a_name_given_to_a_file_is_no_reason_to_read_it_again_and_a_write_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publishing hashed each linked file of the base once more, and stopped runs that made features of it."""
    file, digests, watching = tmp_path / "file", FileDigests(), FileDigests()
    file.write_bytes(b"before")
    digest = digests.of(file)
    watching.watch([file])
    read: list[Path] = []
    monkeypatch.setattr(file_digests, "sha256_file", lambda path: read.append(path) or sha256_file(path))
    assert digests.link(file, tmp_path / "other") == digest
    digests.require_unchanged()
    watching.require_unchanged()
    assert read == []
    file.write_bytes(b"behind")
    for known in (digests, watching):
        with pytest.raises(IntegrityError, match="changed meanwhile"):
            known.require_unchanged()


def test_where_nothing_can_be_linked_the_same_bytes_are_copied(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    publish(base, tmp_path)
    copied = tmp_path / "model" / SECOND
    assert copied.read_bytes() == (base / SECOND).read_bytes() and not copied.samefile(base / SECOND)


def test_a_base_whose_tensors_are_cast_is_written_whole(base: Path, tmp_path: Path) -> None:
    """Its files hold other bits than what was trained on."""
    config = (base / "config.json").read_text()
    other = tmp_path / "bf16"
    shutil.copytree(base, other)
    (other / "config.json").write_text(config.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    published = publish(other, tmp_path / "run", torch.bfloat16)
    assert {tensor.dtype for tensor in published.values()} == {torch.bfloat16}
    assert not (tmp_path / "run" / "model" / INDEX).exists()
