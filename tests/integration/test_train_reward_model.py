"""`stage: rm`: a head that scores answers, resumed exactly, published beside the model, and judged by pairs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mllm_assets.errors import RecipeError
from mllm_assets.evaluation.metrics import compute_metrics
from mllm_assets.evaluation.predict import evaluate_task
from mllm_assets.recipe.load import load_recipe
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.loop.engine import train_task
from mllm_assets.training.models.value_head import VALUE_HEAD_FILE
from mllm_assets.worker.protocol import Reporter
from tests.interruption import EXACT_FILES
from tests.worker_tasks import evaluation, training

pytestmark = pytest.mark.integration
CONFIG = json.loads((Path(__file__).parents[1] / "golden/preferences/rm_lora.json").read_text())["config"]
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "max_samples": 12, "eval_dataset": "rank"}


def spec_of(folder: Path, **overrides: Any) -> TrainSpec:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({**CONFIG, **SAVED, "model_name_or_path": "model", **overrides}))
    return load_recipe(path).spec


def trained(parity_dir: Path, run_dir: Path, spec: TrainSpec, **fields: Any) -> dict[str, Any]:
    task = training(spec, model_dir=parity_dir / "model", data_dir=parity_dir / "data", run_dir=run_dir, **fields)
    return train_task(task, Reporter())


@pytest.fixture(scope="module")
def run_dir(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    trained(parity_dir, folder / "run", spec_of(folder))
    return folder / "run"


def test_a_resumed_run_ends_with_the_same_bits(parity_dir: Path, run_dir: Path, tmp_path: Path) -> None:
    """The head drops values out while it trains: a resume draws what the run would have drawn."""
    cut = tmp_path / "run"
    shutil.copytree(run_dir / "checkpoint-2", cut / "checkpoint-2")
    for name in ("run.json", "trainer_log.jsonl"):
        shutil.copy(run_dir / name, cut)
    assert trained(parity_dir, cut, spec_of(tmp_path))["resumed_from_step"] == 2
    for name in EXACT_FILES:
        assert (cut / "checkpoint-4" / name).read_bytes() == (run_dir / "checkpoint-4" / name).read_bytes(), name
    for name in ("model.safetensors", VALUE_HEAD_FILE):
        assert (cut / "model" / name).read_bytes() == (run_dir / "model" / name).read_bytes(), name


def test_the_head_is_published_beside_a_model_that_loads_strictly(parity_dir: Path, run_dir: Path) -> None:
    _, info = AutoModelForImageTextToText.from_pretrained(run_dir / "model", output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    head, trained = (load_file(run_dir / p) for p in (f"model/{VALUE_HEAD_FILE}", "checkpoint-4/trainable.safetensors"))
    assert {name: tuple(t.shape) for name, t in head.items()} == {
        "v_head.summary.weight": (1, 64), "v_head.summary.bias": (1,),
    }  # fmt: skip
    assert all((tensor == trained[f"base_model.model.{name}"]).all() for name, tensor in head.items())
    assert (run_dir / "adapter" / VALUE_HEAD_FILE).read_bytes() == (run_dir / "model" / VALUE_HEAD_FILE).read_bytes()


@pytest.mark.slow
def test_cached_features_leave_the_losses_as_they_are(parity_dir: Path, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, max_samples=4, save_strategy="no")
    plain = trained(parity_dir, tmp_path / "plain", spec)
    cached = trained(parity_dir, tmp_path / "cached", spec, cache_dir=tmp_path / "cache")
    assert "cached" in cached["caches"]["vision_features"]
    assert cached["final_loss"] == pytest.approx(plain["final_loss"], abs=5e-6)


def test_it_is_judged_by_how_often_the_preferred_answer_is_ahead(
    parity_dir: Path, run_dir: Path, tmp_path: Path
) -> None:
    spec, tables = spec_of(tmp_path), {}
    for name in ("model", "checkpoint-4"):
        task = evaluation(
            model_dir=run_dir / name, base_model_dir=parity_dir / "model", data_dir=parity_dir / "data",
            directory=tmp_path / name, recipe=spec, max_samples=12,
        )  # fmt: skip
        evaluate_task(task, Reporter())
        tables[name] = pq.read_table(tmp_path / name / "predictions.parquet")
    published, checkpoint = (table.drop_columns(["latency_s"]).to_pylist() for table in tables.values())
    assert published == checkpoint
    pairs = json.loads((parity_dir / "data" / "rank.json").read_text())
    assert {row["reference"] for row in published} <= {pair["chosen"]["content"] for pair in pairs}
    for row in published:
        assert (row["answer"] == row["reference"]) == (row["loss_nats"] < 0.6931471)
    scored = compute_metrics(tables["model"], ["an answer"])["entries"]["rank"]
    assert scored["primary"] == "exact_match"
    tuned = [row for row in published if row["model"] == "tuned"]
    share = sum(row["answer"] == row["reference"] for row in tuned) / len(tuned)
    assert scored["models"]["tuned"]["exact_match"] == pytest.approx(share)
    answers = evaluation(
        model_dir=run_dir / "model", base_model_dir=parity_dir / "model", data_dir=parity_dir / "data",
        directory=tmp_path / "answers", recipe=spec_of(tmp_path, eval_dataset="gemma3_vlm_val"),
    )  # fmt: skip
    with pytest.raises(RecipeError, match=r"judged by pairs of answers, and the entry gemma3_vlm_val has none"):
        evaluate_task(answers, Reporter())
