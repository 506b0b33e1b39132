"""What a release is judged by is what was written when the model was asked."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mllm_assets.artifacts import write_manifest
from mllm_assets.errors import IntegrityError
from mllm_assets.evaluation.metrics import METRICS_FILE, compute_metrics, write_metrics
from mllm_assets.evaluation.table import PREDICTIONS_FILE
from mllm_assets.layout import Layout
from mllm_assets.releases.publish import read_judgement
from tests.unit.evaluation.made_predictions import predictions

pytestmark = pytest.mark.not_fast


@pytest.fixture
def metrics_dir(tmp_path: Path) -> Path:
    said = predictions()
    (tmp_path / "said").mkdir()
    pq.write_table(said, tmp_path / "said" / PREDICTIONS_FILE)
    write_manifest(tmp_path / "said", {})
    inputs = {
        "weights_digest": "c" * 64, "predictions": "p" * 64, "predictions_path": "said",
        "data_digests": {"pets_val": "d" * 64},
    }  # fmt: skip
    write_metrics(tmp_path / "metrics", compute_metrics(said, ["cat", "dog", "cat"]), inputs)
    return tmp_path / "metrics"


def test_metrics_and_predictions_are_read_as_they_were_written(metrics_dir: Path, tmp_path: Path) -> None:
    judgement = read_judgement(metrics_dir, Layout(tmp_path))
    assert judgement.metrics["entries"]["pets_val"]["num_samples"] == 6
    assert judgement.predictions.equals(predictions())
    assert (judgement.weights_digest, judgement.data_digests) == ("c" * 64, {"pets_val": "d" * 64})


@pytest.mark.parametrize("file", [f"metrics/{METRICS_FILE}", f"said/{PREDICTIONS_FILE}"])
def test_a_figure_that_was_changed_by_hand_judges_nothing(metrics_dir: Path, tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=f"{path.name} does not match its digest. Materialise "):
        read_judgement(metrics_dir, Layout(tmp_path))
