"""A model in two files with the tensors' names of google/gemma-3-4b-it, from the pretrained directory to a release."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_assets.artifacts import read_manifest
from mllm_assets.evaluation.gates import GateSpec
from mllm_assets.evaluation.metrics import compute_metrics
from mllm_assets.evaluation.predict import evaluate_task
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.layout import Layout
from mllm_assets.releases.check import verify
from mllm_assets.releases.publish import Candidate, Judgement, publish
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import TrainTask, VerifyTask
from tests.google_layout import FIRST, SECOND, google_names, in_google_layout, tensors_of
from tests.integration.test_eval_release import LINEAGE
from tests.interruption import make_task
from tests.worker_tasks import evaluation, training

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ANYTHING_PASSES = GateSpec(min_loss_gain_nats=-99, min_answer_gain=-1, min_image_gain_nats=-99)
RECIPES: dict[str, dict[str, Any]] = {
    "projector": {"finetuning_type": "full", "freeze_language_model": True},
    "last layer": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "freeze_multi_modal_projector": True},
    "lora": {"finetuning_type": "lora", "lora_rank": 2},
}


@pytest.fixture(scope="module")
def google(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_google_layout(parity_dir / "model", tmp_path_factory.mktemp("pretrains") / "gemma")


def from_google(task: TrainTask, google: Path, run_dir: Path, cache_dir: Path) -> TrainTask:
    return training(
        task.recipe, model_dir=google, data_dir=task.data_dir, run_dir=run_dir, cache_dir=cache_dir, stages=task.stages
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_trains_caches_answers_and_is_released_as_a_model_with_this_librarys_names(
    google: Path, parity_dir: Path, tmp_path: Path, recipe: str
) -> None:
    plain = make_task(
        parity_dir, tmp_path / "plain", cache_dir=tmp_path / "cache", max_steps=3, save_steps=3, eval_strategy="no",
        max_samples=4, **RECIPES[recipe],
    )  # fmt: skip
    run_dir = tmp_path / "outputs" / "r" / "0123"
    expected = train_task(plain, Reporter())
    features = {path.name for path in (tmp_path / "cache" / "features").iterdir()}
    manifest = train_task(from_google(plain, google, run_dir, tmp_path / "cache"), Reporter())
    assert {path.name for path in (tmp_path / "cache" / "features").iterdir()} == features
    assert manifest["caches"] == expected["caches"] and manifest["caches"]["vision_features"] == "cached"
    assert manifest["reload"]["loss_saved"] == pytest.approx(expected["reload"]["loss_saved"], rel=1e-5)

    published, wanted = tensors_of(run_dir / "model"), google_names(tensors_of(tmp_path / "plain" / "model"))
    assert published.keys() == wanted.keys() == tensors_of(google).keys()
    assert all(torch.allclose(published[name], wanted[name], rtol=0, atol=1e-5) for name in wanted)
    linked = {"projector": [SECOND], "last layer": [FIRST]}.get(recipe, [])
    assert manifest["base_weights"]["linked"] == linked
    assert all((run_dir / "model" / name).read_bytes() == (google / name).read_bytes() for name in linked)
    if recipe != "projector":
        return

    asked = evaluation(
        model_dir=run_dir / "model", base_model_dir=google, data_dir=plain.data_dir, directory=tmp_path / "said",
        features_root=tmp_path / "cache" / "features", max_new_tokens=2, max_samples=4,
    )  # fmt: skip
    evaluate_task(asked, Reporter())
    said = read_predictions(tmp_path / "said")
    judgement = Judgement(
        metrics=compute_metrics(said, ["crayon"]), predictions=said, weights_digest=manifest["weights_digest"],
        predictions_digest="89ab", data_digests={},
    )  # fmt: skip

    def verified(directory: Path) -> dict[str, Any]:
        task = VerifyTask(directory=directory, checkpoint_dir=run_dir / "model", base_model_dir=google)
        return verify(task, Reporter()).facts()

    candidate = Candidate(recipe_name="r", run_dir=run_dir, judgement=judgement, lineage=LINEAGE)
    release = publish(candidate, ANYTHING_PASSES, Layout(tmp_path), verify=verified)
    facts = read_manifest(release.directory)["verification"]
    assert (facts["num_missing"], facts["num_unexpected"], facts["oldest_transformers"]) == (0, 0, "4.57")
    assert tensors_of(release.directory).keys() == tensors_of(google).keys()
