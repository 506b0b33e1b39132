"""Predictions made by hand."""

from typing import Any

import pyarrow as pa

from mllm_assets.evaluation.table import to_table

ANSWERS = {
    "base": ["zebra", "cat", "zebra", "zebra", "zebra", "zebra"],
    "tuned": ["cat", "cat", "dog", "bird", "fish", "cow"],
}
REFERENCES = ["cat", "cat", "dog", "bird", "fish", "horse"]
LOSSES = {"base": 3.0, "tuned": 1.0}


def prediction(model: str, index: int, **changes: Any) -> dict[str, Any]:
    loss = LOSSES[model] + 0.01 * index
    return {
        "model": model,
        "entry": "pets_val",
        "sample_id": f"sample-{index}",
        "row_index": index,
        "images": [f"images/{index}.png"],
        "prompt": "Which animal?",
        "reference": REFERENCES[index],
        "label": REFERENCES[index],
        "answer": ANSWERS[model][index],
        "loss_nats": loss,
        "loss_shuffled_nats": loss + (0.5 + 0.01 * index if model == "tuned" else 0.0),
        "num_supervised_tokens": 2 + index,
        "num_answer_tokens": 2,
        "latency_s": 0.1,
    } | changes


def predictions(**changes: Any) -> pa.Table:
    """Six samples, answered by base and tuned; `changes` apply to every row."""
    return to_table([prediction(model, index, **changes) for model in ("base", "tuned") for index in range(6)])
