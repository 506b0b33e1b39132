"""A wrong label is what a trained model finds least likely."""

import json
import shutil
from pathlib import Path

import pytest

from mllm_assets.cli import main
from mllm_assets.data.quality.store import QualityStore, table_for, utc_now
from mllm_assets.evaluation.metrics import sample_metrics
from mllm_assets.evaluation.predict import evaluate_task
from mllm_assets.evaluation.table import read_predictions, store_table
from mllm_assets.layout import Layout
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker.protocol import Reporter
from tests.worker_tasks import evaluation, training

pytestmark = pytest.mark.integration
PLANTED = 2
LABELS = ("skull", "heart", "face", "tree", "house", "clock")


@pytest.mark.slow
def test_a_planted_wrong_label_comes_first(
    parity_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data_dir = tmp_path / "data"
    shutil.copytree(parity_dir / "data", data_dir)
    rows = json.loads((data_dir / "train.json").read_text())[:6]
    for number, row in enumerate(rows):  # a model so small and so briefly trained hears more than it sees
        question = {"role": "user", "content": f"<image>What is picture {number}?"}
        row["messages"] = [question, {"role": "assistant", "content": LABELS[number]}]
        row["images"] = row["images"][:1]
    (data_dir / "train.json").write_text(json.dumps(rows))
    wrong = json.loads(json.dumps(rows))
    wrong[PLANTED]["messages"][-1] = rows[PLANTED + 1]["messages"][-1]
    assert wrong[PLANTED]["messages"][-1] != rows[PLANTED]["messages"][-1]
    (data_dir / "val.json").write_text(json.dumps(wrong))
    recipe = TrainSpec(
        model_name_or_path="model", dataset="gemma3_vlm_train", template="gemma3", do_train=True,
        finetuning_type="full", freeze_multi_modal_projector=False, learning_rate=5e-3, max_steps=80,
        per_device_train_batch_size=6, logging_steps=10, save_strategy="no",
    )  # fmt: skip
    model_dir, run_dir = parity_dir / "model", tmp_path / "run"
    train_task(training(recipe, model_dir=model_dir, data_dir=data_dir, run_dir=run_dir), Reporter())
    evaluate = evaluation(
        model_dir=run_dir, base_model_dir=model_dir, data_dir=data_dir, directory=tmp_path / "predictions",
        max_new_tokens=8,
    )  # fmt: skip
    evaluate_task(evaluate, Reporter())

    said = read_predictions(tmp_path / "predictions")
    names = {"run_id": "r", "recipe": "parity", "checkpoint_digest": "c"}
    run = {"run_id": "r", "asset": "parity/predictions", "created_at": utc_now()}
    QualityStore(Layout(tmp_path).quality_db).write(
        {"predictions": store_table(said, sample_metrics(said), **names), "runs": table_for("runs", [run])}
    )
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(tmp_path))
    assert main(["quality", "hardest", "--recipe", "parity", "--limit", "2", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["row_index"] == PLANTED and first["loss_nats"] > 2 * second["loss_nats"]
    assert not first["is_right"]
