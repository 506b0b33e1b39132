"""A released model, loaded by other means than ours."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm_assets.artifacts import read_manifest, write_manifest
from mllm_assets.errors import IntegrityError
from mllm_assets.evaluation.gates import GateSpec
from mllm_assets.evaluation.metrics import compute_metrics
from mllm_assets.evaluation.table import to_table
from mllm_assets.layout import Layout
from mllm_assets.releases.check import verify
from mllm_assets.releases.publish import Candidate, Judgement, Release, publish
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import VerifyTask

pytestmark = pytest.mark.integration
GOLDEN = Path(__file__).parents[1] / "golden" / "parity"
LINEAGE: Any = {
    "base_model": {"name": "parity", "fingerprint": "0" * 16},
    "pretrained_model": {"name": "parity", "fingerprint": "0" * 16},
    "datasets": [{"entry": "gemma3_vlm_train", "use": "train", "digest": "1" * 16}],
    "recipe": {"finetuning_type": "full"},
    "versions": {"torch": torch.__version__},
    "command": "make demo",
    "leaks": [],
}
RUN = {
    "fingerprint": "0123",
    "weights_digest": "4567",
    "recipe": {"template": "gemma3", "image_max_pixels": 589824, "enable_thinking": True},
    "reload": {"num_missing": 0, "num_unexpected": 0, "loss_saved": 1.5, "loss_reloaded": 1.5},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "outputs" / "parity" / "0123"
    shutil.copytree(GOLDEN / "model", directory / "model")
    write_manifest(directory, RUN)
    return directory


def passing_predictions() -> pa.Table:
    row = {
        "entry": "v", "images": [], "prompt": "?", "label": None, "num_supervised_tokens": 2, "num_answer_tokens": 1,
        "latency_s": 0.0,
    }  # fmt: skip
    rows = [
        row
        | {"model": model, "sample_id": str(i), "row_index": i, "reference": f"word{i}", "answer": f"{word}{i}"}
        | {"loss_nats": loss, "loss_shuffled_nats": loss + 0.1 + i / 100}
        for model, word, loss in (("base", "no", 2.0), ("tuned", "word", 1.0))
        for i in range(4)
    ]
    return to_table(rows)


def task_for(directory: Path, run_dir: Path, base_model_dir: Path = GOLDEN / "model") -> VerifyTask:
    return VerifyTask(directory=directory, checkpoint_dir=run_dir / "model", base_model_dir=base_model_dir)


def released(run_dir: Path, root: Path) -> Release:
    def verified(directory: Path) -> dict[str, Any]:
        return verify(task_for(directory, run_dir), Reporter()).facts()

    said = passing_predictions()
    judgement = Judgement(
        metrics=compute_metrics(said, ["other"]), predictions=said, weights_digest="4567", predictions_digest="89ab",
        data_digests={},
    )  # fmt: skip
    candidate = Candidate(recipe_name="parity", run_dir=run_dir, judgement=judgement, lineage=LINEAGE)
    return publish(candidate, GateSpec(), Layout(root), verify=verified)


def test_a_release_loads_in_a_new_process_with_transformers_alone(run_dir: Path, tmp_path: Path) -> None:
    release = released(run_dir, tmp_path)
    verification = read_manifest(release.directory)["verification"]
    assert (verification["num_missing"], verification["num_unexpected"]) == (0, 0)
    assert verification["num_params"] == 265_088
    assert verification["oldest_transformers"] == "5.23", "the tower's tensors have no `vision_model.` in their names"
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "model, info = AutoModelForImageTextToText.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "AutoProcessor.from_pretrained(sys.argv[1])\n"
        "assert not any(info[kind + '_keys'] for kind in ('missing', 'unexpected', 'mismatched')), info\n"
        "assert not any(name.startswith('mllm_assets') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(release.directory)], check=True, cwd=tmp_path)


@pytest.mark.slow
def test_the_card_shows_how_to_use_the_model_and_the_code_runs(run_dir: Path, tmp_path: Path) -> None:
    """A snippet that does not run is worse than none."""
    release = released(run_dir, tmp_path)
    code = (release.directory / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("PATH", str(release.directory)).replace("max_new_tokens=100", "max_new_tokens=2")
    shutil.copy(GOLDEN / "data" / "images" / "emoji_000.png", tmp_path / "image.png")
    subprocess.run([sys.executable, "-W", "error::SyntaxWarning", "-c", code], check=True, cwd=tmp_path)


@pytest.mark.slow
def test_other_weights_than_the_checkpoints_are_found(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_dir / "model", other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("mm_input_projection_weight"))
    weights[name] = weights[name] * 2
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="on a fixed picture, expected the checkpoint's"):
        verify(task_for(other, run_dir), Reporter())


def test_a_lost_tensor_is_counted(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_dir / "model", other)
    weights = load_file(other / "model.safetensors")
    weights.pop(next(name for name in weights if name.endswith("mm_input_projection_weight")))
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="lacks 1 tensors, has 0 that the model does not know"):
        verify(task_for(other, run_dir), Reporter())
