"""Learning from pairs and marked answers: LLaMA-Factory's rows, losses and rewards, from caches, resumed exactly."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import DataError, RecipeError
from mllm_assets.recipe.load import load_recipe
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.inputs import read_inputs
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.loop.engine import train_task
from mllm_assets.training.loop.preferences import REFERENCE_FILE
from mllm_assets.worker.protocol import Reporter
from tests.interruption import EXACT_FILES
from tests.worker_tasks import training

pytestmark = pytest.mark.integration

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED = sorted(path.stem for path in (GOLDEN / "preferences").glob("*.json"))
QUICK = {"rm_full", "lora", "evaluated", "projector", "kto_cut", "kto_weights"}
MEASURED = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "num_train_epochs": 2}


def spec_of(config: dict[str, Any], folder: Path, **overrides: Any) -> TrainSpec:
    """Read the recipe as a user's file is read."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**config, "model_name_or_path": "model", **overrides}))
    return load_recipe(path).spec


def trained(spec: TrainSpec, parity_dir: Path, run_dir: Path, **fields: Any) -> list[dict[str, Any]]:
    """Train, and return the lines of the log."""
    task = training(spec, model_dir=parity_dir / "model", data_dir=parity_dir / "data", run_dir=run_dir, **fields)
    train_task(task, Reporter())
    return [json.loads(line) for line in (run_dir / "trainer_log.jsonl").read_text().splitlines()]


def rows_of(spec: TrainSpec, parity_dir: Path, folder: Path) -> EncodedRows:
    data = Dataset(parity_dir / "data")
    return read_inputs(spec, parity_dir / "model", data, folder / "rows", Reporter()).train_rows


def require_equal(spec: TrainSpec, lines: list[dict[str, Any]], recorded: list[dict[str, Any]]) -> None:
    """A reward is `pref_beta` times the difference of two sums of some hundred nats, in 32 bits."""
    for kind, prefix in (("loss", ""), ("eval_loss", "eval_")):
        ours, theirs = ([line for line in some if kind in line] for some in (lines, recorded))
        tolerances = {kind: 2e-5, **{f"{prefix}{name}": 2e-4 * spec.pref_beta for name in MEASURED}}
        tolerances |= {f"{prefix}logps/chosen": 2e-4, f"{prefix}logps/rejected": 2e-4}
        if spec.learns_scores:  # LLaMA-Factory logs no more
            tolerances = {kind: 2e-5}
            accuracies = [line.get("eval_rewards/accuracies") for line in ours]
            assert accuracies == pytest.approx([line.get("eval_accuracy") for line in theirs])
        for key, tolerance in tolerances.items():
            assert [line.get(key) for line in ours] == pytest.approx(
                [line.get(key) for line in theirs], abs=tolerance
            ), key


def as_recorded(row: EncodedRow) -> dict[str, Any]:
    kinds = ("chosen_", "rejected_") if row.mark is None else ("", "kl_")
    names = ("input_ids", "labels")
    sides = zip(kinds, row.sequences, strict=True)
    tokens = {f"{side}{name}": list(getattr(one, name)) for side, one in sides for name in names}
    return tokens if row.mark is None else {**tokens, "kto_tags": row.mark}


@pytest.mark.parametrize("name", ["dpo_lora", "kto_lora"])
def test_rows_losses_and_rewards_equal_llamafactorys(parity_dir: Path, tmp_path: Path, name: str) -> None:
    reference = json.loads((parity_dir / "reference" / f"{name}.json").read_text())
    spec = spec_of(reference["config"], tmp_path)
    rows = rows_of(spec, parity_dir, tmp_path)
    encoded = [as_recorded(row) for row in rows]
    for sample in reference["samples"]:
        assert {key: sample[key] for key in encoded[0]} in encoded
    lines = trained(spec, parity_dir, tmp_path / "run")
    require_equal(spec, lines, [log for log in reference["logs"] if "loss" in log])


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in RECORDED]
)
def test_every_loss_of_preferences_is_llamafactorys(parity_dir: Path, tmp_path: Path, case: str) -> None:
    recorded = json.loads((GOLDEN / "preferences" / f"{case}.json").read_text())
    spec = spec_of(recorded["config"], tmp_path)
    rows = rows_of(spec, parity_dir, tmp_path)
    assert [as_recorded(row) for row in rows] == recorded["rows"]
    lines = trained(spec, parity_dir, tmp_path / "run")
    require_equal(spec, lines, recorded["logs"])
    if spec.learns_marks:  # LLaMA-Factory logs the sum over the batches of a step
        kls = [log["kl"] / spec.gradient_accumulation_steps for log in recorded["logs"] if "loss" in log]
        assert [line["kl"] for line in lines if "loss" in line] == pytest.approx(kls, abs=2e-4)


def marks(folder: Path, **overrides: Any) -> TrainSpec:
    return pairs(folder, **{"stage": "kto", "dataset": "kto", **overrides})


def pairs(folder: Path, **overrides: Any) -> TrainSpec:
    config = json.loads((GOLDEN / "preferences" / "lora.json").read_text())["config"]
    return spec_of(config, folder, **{**SAVED, **overrides})


@pytest.mark.slow
@pytest.mark.parametrize("of_stage", [pairs, marks])
def test_no_step_runs_the_tower_and_the_trajectory_stays(
    parity_dir: Path, tmp_path: Path, of_stage: Callable[..., TrainSpec]
) -> None:
    """Policy and reference read the same cached features; the hidden states of both answers are cached as well."""
    for name, method in (("features", {}), ("states", {"finetuning_type": "freeze", "freeze_trainable_layers": 1})):
        folder = tmp_path / name
        folder.mkdir()
        spec = of_stage(folder, **method, max_steps=-1, max_samples=6, save_strategy="no")
        plain = trained(spec, parity_dir, folder / "plain")
        cached = trained(spec, parity_dir, folder / "cached", cache_dir=folder / "cache")
        facts = json.loads((folder / "cached" / "manifest.json").read_text())["caches"]
        assert "cached" in facts["vision_features"]
        assert facts["hidden_states"].startswith("cached") == (name == "states")
        assert [line["loss"] for line in cached] == pytest.approx([line["loss"] for line in plain], abs=5e-6)


@pytest.mark.parametrize(
    ("of_stage", "reference"), [(pairs, "kept"), (pairs, "damaged"), (pairs, "gone"), (marks, "damaged")]
)
def test_a_resumed_run_ends_with_the_same_bits(
    parity_dir: Path, tmp_path: Path, of_stage: Callable[..., TrainSpec], reference: str
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    spec = of_stage(tmp_path)
    lines = trained(spec, parity_dir, whole)
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    for name in ("run.json", REFERENCE_FILE, "trainer_log.jsonl"):
        shutil.copy(whole / name, cut)
    if reference == "damaged":
        (cut / REFERENCE_FILE).write_text((cut / REFERENCE_FILE).read_text().replace("1", "2", 1))
    elif reference == "gone":
        (cut / REFERENCE_FILE).unlink()
    resumed = trained(spec, parity_dir, cut)
    for name in EXACT_FILES:
        assert (cut / "checkpoint-4" / name).read_bytes() == (whole / "checkpoint-4" / name).read_bytes(), name
    assert [line["loss"] for line in resumed] == [line["loss"] for line in lines]
    assert (cut / REFERENCE_FILE).read_bytes() == (whole / REFERENCE_FILE).read_bytes()


def test_pairs_marks_and_answers_are_not_taken_for_each_other(parity_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"the entry rank has no marks: its `columns` do not name a `kto_tag`"):
        trained(marks(tmp_path, dataset="rank"), parity_dir, tmp_path / "run")
    with pytest.raises(DataError, match=r"Row kto\[1\] is marked as a bad answer .* Set stage: kto"):
        trained(pairs(tmp_path, stage="sft", dataset="kto"), parity_dir, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"the entry gemma3_vlm_train has none: it does not set `ranking`\. Name"):
        trained(pairs(tmp_path, dataset="gemma3_vlm_train"), parity_dir, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"The entry rank sets `ranking`.* Set stage: dpo"):
        trained(pairs(tmp_path, stage="sft"), parity_dir, tmp_path / "run")
