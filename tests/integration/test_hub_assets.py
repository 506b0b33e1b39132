"""`<dataset>/raw` and `pretrained/<model>` from a gated stand-in Hub, as Dagster runs them, with a planted token."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save

from tests.integration.conftest import make_project
from tests.integration.stand_in_hub import GOOD_TOKEN, OTHER_TOKEN, SIGNATURE, Repo, running_hub

pytestmark = [pytest.mark.integration, pytest.mark.slow]

DATASET = """type: mllm_assets.components.ImageTextDataset
attributes:
  name: birds
  source: {kind: huggingface, repo: made/set, revision: main}
  prompts: ["What is this?"]
"""
MODELS = """type: mllm_assets.components.PretrainedModels
attributes:
  models:
    - {name: made, kind: huggingface, repo: made/model, revision: main}
"""


def dataset_files() -> dict[str, bytes]:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [b"an image"] * 20, "text": [f"bird {n}" for n in range(20)]}), buffer)
    return {"data/train-00000-of-00001.parquet": buffer.getvalue()}


def test_a_gated_dataset_and_model_come_with_their_commits_and_the_token_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path)
    defs = tmp_path / project.package / "defs"
    (defs / "datasets" / "birds").mkdir()
    (defs / "datasets" / "birds" / "defs.yaml").write_text(DATASET)
    (defs / "pretrained" / "defs.yaml").write_text(MODELS)
    with running_hub() as hub:
        weights = save({"weight": np.arange(50_000, dtype=np.float32)})
        model = {"config.json": b"{}", "model.safetensors": weights, "modeling.py": b"raise SystemExit"}
        hub.repos = {
            "datasets/made/set": Repo.of(dataset_files(), gated=True),
            "models/made/model": Repo.of(model, gated=True),
        }
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
        selection = 'key:"birds/raw" or key:"pretrained/made"'
        refused = project.materialize(selection)
        refused_output, _ = refused.communicate(timeout=500)
        monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
        output = project.made(selection)
    assert refused.returncode != 0
    # not the terminal's lines: Dagster shows a step's through `tail`, which it ends with the step
    told = b"".join(path.read_bytes() for path in project.home.glob("history/runs/*"))
    for message in ("The dataset made/set is gated, and the account of HF_TOKEN", "The model made/model is gated"):
        assert message.encode() in told
    assert project.metadata("birds", "raw")["revision"] == hub.repos["datasets/made/set"].head
    assert project.metadata("pretrained", "made")["revision"] == hub.repos["models/made/model"].head
    manifest = json.loads((tmp_path / "pretrains" / "made" / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["config.json", "model.safetensors"]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10  # Dagster's databases and logs are among them
    for secret in (GOOD_TOKEN, OTHER_TOKEN, SIGNATURE):
        assert secret not in output + refused_output
        assert not any(secret.encode() in data for data in written)
