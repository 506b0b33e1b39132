"""What an asset's page shows of metrics and gates: tables of few columns, and the confusion matrix as a picture."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mllm_assets.data.quality.report import markdown_table
from mllm_assets.evaluation.intervals import gain_text

MAX_LABELS = 20  # a larger matrix cannot be read
MAX_MISTAKES = 10
MAX_LABEL_CHARS = 24
WIDTH_IN = 8.8  # at 100 dpi as wide as the window in which Dagster shows it


def metrics_markdown(scored: Mapping[str, Any]) -> str:
    """The tuned model's metrics against the base model's; `scored` is an entry of `compute_metrics`."""
    base, gains = scored["models"].get("base", {}), scored["gains"].get("tuned_over_base", {})
    return markdown_table(
        ("metric", "base → tuned", "gain (95 % interval)"),
        (
            (name, f"{_short(base.get(name))} → {_short(value)}", gain_text(gains.get(name)))
            for name, value in scored["models"]["tuned"].items()
        ),
    )


def release_gains_markdown(gains: Mapping[str, Any]) -> str:
    """An entry's gains over the current release; `gains` is an entry of `gains_over_release`."""
    return markdown_table(
        ("metric", "gain (95 % interval)"), ((metric, gain_text(gain)) for metric, gain in gains.items())
    )


def gates_markdown(gates: Sequence[Mapping[str, Any]]) -> str:
    """Gates with their figures, as fields of `GateResult`; those of older releases have no `low` and `high`."""
    return markdown_table(
        ("gate", "figure (95 % interval)", "threshold", "passed"),
        (
            (
                gate["name"],
                _short(gate["observed"])
                + (f" ({_short(gate['low'])} to {_short(gate['high'])})" if gate.get("low") is not None else ""),
                _short(gate["threshold"]),
                "yes" if gate["passed"] else "no" if gate["required"] else "no, allowed",
            )
            for gate in gates
        ),
    )


def _short(value: float | None) -> str:
    """Four significant digits, and no `-0`; empty where there is none."""
    return "" if value is None else f"{value:z.4g}"


def mistakes_markdown(confusion: Mapping[str, Any]) -> str:
    """What was named most often instead of the right label: at most `MAX_MISTAKES`, the most frequent first."""
    found = [
        (label, name, count)
        for label, counts in zip(confusion["labels"], confusion["counts"], strict=True)
        for name, count in zip(confusion["named"], counts, strict=True)
        if count and name != label
    ]
    return markdown_table(("right label", "named", "samples"), sorted(found, key=lambda row: -row[2])[:MAX_MISTAKES])


def confusion_png(confusion: Mapping[str, Any]) -> bytes | None:
    """The matrix of right labels (rows) and named ones (columns); None of more than `MAX_LABELS` labels.

    A cell is the darker, the more of its row's samples it has; the columns that nothing was named as are left out.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    labels, counts = confusion["labels"], np.array(confusion["counts"])
    if len(labels) > MAX_LABELS:
        return None
    shown = [i for i, name in enumerate(confusion["named"]) if name in labels or counts[:, i].any()]
    counts, named = counts[:, shown], [confusion["named"][i] for i in shown]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(WIDTH_IN, 1.7 + 0.34 * len(labels)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(named)), [_label(name) for name in named], rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), [_label(name) for name in labels], fontsize=8)
    axes.set(xlabel="named by the tuned model", ylabel="right label")
    for row, label in enumerate(labels):  # the right answers
        corner = (named.index(label) - 0.5, row - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#1a7f4b", linewidth=1.5))
    for row, column in zip(*np.nonzero(counts), strict=True):
        is_right = named[column] == labels[row]
        axes.text(
            column, row, str(counts[row, column]), ha="center", va="center", fontsize=8,
            color="white" if shares[row, column] > 0.5 else "#1c2733", fontweight="bold" if is_right else "normal",
        )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _label(name: str) -> str:
    """As an axis takes it, which reads `$` as mathematics."""
    text = name if len(name) <= MAX_LABEL_CHARS else name[: MAX_LABEL_CHARS - 1] + "…"
    return text.replace("$", r"\$")
