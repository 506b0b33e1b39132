"""Tokens that a recipe adds: the model that trains, resumes, is asked and is published has them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mllm_assets.evaluation.predict import evaluate_task
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.encoding.turns import control_token_pattern
from mllm_assets.training.loop.engine import train_task
from mllm_assets.training.models.load import load_model, load_processor
from mllm_assets.training.models.vocabulary import FOLDER, extended_base
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import TrainTask
from tests.interruption import EXACT_FILES, make_task
from tests.worker_tasks import evaluation

pytestmark = pytest.mark.integration
# more than the embedding's 50 spare rows
PLAIN = ",".join(["arrow", *(f"<place_{number}>" for number in range(60))])
SPECIAL = "star"  # a word of many answers
VALUES: dict[str, Any] = {"add_tokens": PLAIN, "add_special_tokens": SPECIAL}


def task_of(parity_dir: Path, run_dir: Path, **overrides: Any) -> TrainTask:
    saved = {"max_steps": 4, "save_steps": 2, "eval_strategy": "no", "max_samples": 12}
    return make_task(parity_dir, run_dir, **{**VALUES, **saved, **overrides})


@pytest.fixture(scope="module")
def run_dir(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run, whose embeddings train in place."""
    run_dir = tmp_path_factory.mktemp("tokens") / "run"
    train_task(task_of(parity_dir, run_dir), Reporter())
    return run_dir


def spec_of(**values: Any) -> TrainSpec:
    return TrainSpec(
        **{"model_name_or_path": "model", "dataset": "d", "template": "gemma3", "do_train": True, **values}
    )


def test_the_published_directory_loads_strictly_in_plain_transformers_with_its_tokens(
    parity_dir: Path, run_dir: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    old = AutoTokenizer.from_pretrained(parity_dir / "model")
    assert tokenizer.tokenize("a <place_7>")[-1] == "<place_7>" != old.tokenize("a <place_7>")[-1]
    assert tokenizer.chat_template == old.chat_template
    added = tokenizer.added_tokens_decoder[tokenizer.convert_tokens_to_ids(SPECIAL)]
    assert added.special and not tokenizer.added_tokens_decoder[len(old)].special
    model, info = AutoModelForImageTextToText.from_pretrained(run_dir / "model", output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    assert len(tokenizer) == len(old) + 62
    assert model.get_input_embeddings().weight.shape[0] == math.ceil(len(tokenizer) / 64) * 64
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    begun = load_model(run_dir / FOLDER).get_input_embeddings().weight
    assert not torch.equal(model.get_input_embeddings().weight[len(old)], begun[len(old)]), "it trained"
    assert not (run_dir / "adapter").exists(), "on the model that the recipe names it would not be the trained one"


@pytest.mark.parametrize("base", ["whole", "damaged"])
def test_a_resumed_run_ends_with_the_same_bits(parity_dir: Path, run_dir: Path, tmp_path: Path, base: str) -> None:
    cut = tmp_path / "run"
    shutil.copytree(run_dir, cut, ignore=shutil.ignore_patterns("manifest.json", "checkpoint-4", "model"))
    shutil.copy(run_dir / "checkpoint-2" / "manifest.json", cut / "checkpoint-2")
    shutil.copy(run_dir / FOLDER / "manifest.json", cut / FOLDER)
    if base == "damaged":
        weights = cut / FOLDER / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    result = train_task(task_of(parity_dir, cut), Reporter())
    assert result["resumed_from_step"] == 2
    for name in EXACT_FILES:
        assert (cut / "checkpoint-4" / name).read_bytes() == (run_dir / "checkpoint-4" / name).read_bytes(), name
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (cut / "model" / name).read_bytes() == (run_dir / "model" / name).read_bytes(), name


def test_the_base_is_asked_with_its_own_tokens_and_a_checkpoint_as_the_published_model(
    parity_dir: Path, run_dir: Path, tmp_path: Path
) -> None:
    task, found = task_of(parity_dir, run_dir), {}
    for name in ("model", "checkpoint-4"):
        asked = evaluation(
            model_dir=run_dir / name, base_model_dir=parity_dir / "model", data_dir=parity_dir / "data",
            directory=tmp_path / name, recipe=task.recipe, max_new_tokens=2,
        )  # fmt: skip
        evaluate_task(asked, Reporter())
        rows = pq.read_table(tmp_path / name / "predictions.parquet").to_pylist()
        found[name] = [(r["model"], r["loss_nats"], r["num_supervised_tokens"], r["answer"]) for r in rows]
    assert found["model"] == found["checkpoint-4"]
    base, tuned = ([row[2] for row in found["model"] if row[0] == name] for name in ("base", "tuned"))
    assert sum(base) > sum(tuned), "'arrow' is one token of the tuned model, and several of the base"
    assert all(of_base >= of_tuned for of_base, of_tuned in zip(base, tuned, strict=True))


def test_how_rows_begin_follows_from_the_seed_and_the_descriptions(parity_dir: Path, tmp_path: Path) -> None:
    base, texts = parity_dir / "model", {f"<place_{number}>": "arrow and star" for number in range(60)}

    def rows(folder: str, **values: Any) -> torch.Tensor:
        return load_model(extended_base(base, spec_of(**values), tmp_path / folder)).get_input_embeddings().weight

    known = load_model(base).get_input_embeddings().weight
    first, same, other = (rows(str(n), **VALUES, seed=seed) for n, seed in enumerate((1, 1, 2)))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(first[: len(known)], known)
    tokenizer = load_processor(base).tokenizer
    described = known[tokenizer.encode("arrow and star", add_special_tokens=False)].mean(dim=0)
    for method, is_mean in (("desc_init", True), ("desc_init_w_noise", False)):
        begun = rows(method, new_special_tokens_config=texts, init_special_tokens=method)
        is_same = [torch.allclose(begun[len(tokenizer) + n], described, atol=1e-6) for n in range(60)]
        assert is_same == [is_mean] * 60
    assert extended_base(base, spec_of(resize_vocab=True), tmp_path / "none") == base, "it has rows for all its tokens"
    part = tokenizer.tokenize("arrow and star")[-1]  # is in the vocabulary, as a part of words
    special = extended_base(base, spec_of(add_special_tokens=part), tmp_path / "part")
    there = load_processor(special).tokenizer
    assert there.convert_tokens_to_ids(part) == tokenizer.convert_tokens_to_ids(part)
    assert control_token_pattern(there).search(f"a {part}") is None, "rows may hold it"
    assert not (special / "added_tokens.json").exists()
    with_pieces = shutil.copytree(base, tmp_path / "with_pieces")
    (with_pieces / "tokenizer.model").write_bytes(b"read by llama.cpp's converter, which does not read tokenizer.json")
    extended = extended_base(with_pieces, spec_of(add_tokens="<place>"), tmp_path / "sp")
    assert json.loads((extended / "added_tokens.json").read_text()) == {"<place>": len(tokenizer)}
    manifest = json.loads((tmp_path / "0" / FOLDER / "manifest.json").read_text())
    assert manifest["new_tokens"]["<place_0>"] == len(tokenizer) + 1
