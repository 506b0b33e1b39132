"""What `mllm-assets evaluate` shows."""

from mllm_assets.evaluation.checkpoint_metrics import OverSteps, describe
from mllm_assets.evaluation.scores import METRICS


def test_the_table_has_a_column_for_every_metric_that_was_computed() -> None:
    scored = {name: number + 0.5 for number, name in enumerate(METRICS)}
    result = OverSteps(
        steps={10: {"pets": scored}, 5: {"pets": {**scored, "loss": 1234.5}}},
        primary={"pets": "rouge_l"},
        best={"pets": {"loss": 10, "rouge_l": 5}},
        num_samples={"pets": 8},
        max_samples=None,
    )
    heading, header, first, second, best = describe(result).splitlines()
    assert heading == "pets, 8 samples" and best.split() == "best: step 10 by loss, step 5 by rouge_l".split()
    assert header.split() == ["step", *METRICS]
    assert first.split() == ["5", "1234.5000", *(f"{scored[name]:.4f}" for name in METRICS if name != "loss")]
    assert second.split() == ["10", *(f"{scored[name]:.4f}" for name in METRICS)]
    assert len({len(header), len(first), len(second)}) == 1, "a column's figures are below its name"
