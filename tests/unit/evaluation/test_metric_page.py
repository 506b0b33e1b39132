"""What an asset's page shows of metrics and gates: read at a glance, so it is short and agrees with itself."""

import io
from dataclasses import asdict

from PIL import Image

from mllm_assets.evaluation.gates import GateSpec, evaluate_gates
from mllm_assets.evaluation.metric_page import confusion_png, gates_markdown, metrics_markdown, mistakes_markdown
from mllm_assets.evaluation.metrics import compute_metrics
from mllm_assets.evaluation.table import to_table
from tests.unit.evaluation.made_predictions import REFERENCES, prediction, predictions


def test_metrics_and_gates_are_tables_of_few_columns_without_sentences() -> None:
    """Eight columns of 17 digits and a sentence were cut at the edge of the screen."""
    metrics = compute_metrics(predictions(), REFERENCES)
    text = metrics_markdown(metrics["entries"]["pets_val"])
    assert {line.count(" | ") for line in text.splitlines()} <= {2, 0}
    assert len(text.splitlines()) == 2 + len(metrics["entries"]["pets_val"]["models"]["tuned"])
    gates = gates_markdown([asdict(result) for result in evaluate_gates(metrics, GateSpec())])
    assert "samples" not in gates and max(map(len, gates.splitlines())) < 120


def test_a_gate_has_the_figure_and_the_interval_of_its_sentence() -> None:
    """`observed` was the interval's lower end, the sentence said the mean."""
    rows = [prediction("base", i, loss_nats=1.0) for i in range(6)]
    rows += [prediction("tuned", i, loss_nats=0.7 if i == 0 else 1.0) for i in range(6)]
    gate = evaluate_gates(compute_metrics(to_table(rows), REFERENCES), GateSpec())[0]
    assert "is 0.0500 (95 % interval 0.0000 to 0.1500, 6 samples)" in gate.description
    assert "| 0.05 (0 to 0.15) | 0.01 | no |" in gates_markdown([asdict(gate)])


def test_the_confusion_matrix_is_a_picture_as_wide_as_the_window_and_its_worst_cells_a_table() -> None:
    confusion = compute_metrics(predictions(), REFERENCES)["entries"]["pets_val"]["confusion"]["tuned"]
    with Image.open(io.BytesIO(confusion_png(confusion) or b"")) as picture:
        assert picture.width <= 900
    assert "| horse | (none) | 1 |" in mistakes_markdown(confusion)
    many = {"labels": [str(n) for n in range(21)], "named": [], "counts": []}
    assert confusion_png(many) is None
