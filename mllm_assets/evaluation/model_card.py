"""The released model's README: front matter that the Hugging Face Hub reads, results, and where the model came from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from mllm_assets.artifacts import write_text_atomic
from mllm_assets.evaluation.gates import GateResult
from mllm_assets.evaluation.intervals import gain_text
from mllm_assets.redaction import redacted

# What a card's table shows, in this order; the rest is in eval_metrics.json
SHOWN = "loss loss_shuffled perplexity label_accuracy exact_match cider_d rouge_1 rouge_2 rouge_l bleu chrf".split()
COLUMNS = {"base": "base model", "tuned": "this model", "most_common_answer": "most common training answer"}


class BaseModelLineage(TypedDict):
    """A model that training started from; `hub_id`, `revision` and `license` only where they are known."""

    name: str
    fingerprint: str
    hub_id: NotRequired[str | None]
    revision: NotRequired[str | None]
    license: NotRequired[str | None]


class DatasetLineage(TypedDict):
    """One entry of `dataset_info.json`; `use` is "train" or "evaluate", `digest` its data version."""

    entry: str
    use: str
    digest: str
    num_rows: NotRequired[int | None]
    source: NotRequired[str | None]
    hub_id: NotRequired[str | None]
    revision: NotRequired[str | None]
    license: NotRequired[str | None]


class Origin(TypedDict):
    """What a recipe started from."""

    base_model: BaseModelLineage  # what was fine-tuned; has a Hub id only where it is the Hub's, byte for byte
    pretrained_model: BaseModelLineage  # what the first of a line of recipes started from; often the same


class Lineage(Origin):
    """What a model was made from and how it is made again."""

    datasets: Sequence[DatasetLineage]
    recipe: Mapping[str, Any]  # the recipe's keys as written
    versions: Mapping[str, str]  # library -> version
    command: str
    leaks: Sequence[str]  # what it may have been trained on and is evaluated on; see data.leaks


def write_model_card(
    directory: Path,
    recipe_name: str,
    version: str,
    *,
    run: Mapping[str, Any],
    metrics: Mapping[str, Any],
    gates: Sequence[GateResult],
    lineage: Lineage,
    verification: Mapping[str, Any],
) -> None:
    """Write `README.md`.

    Args:
        directory: The release being built.
        recipe_name: The recipe's slug.
        version: "v1", "v2", ...
        run: The training run's manifest.
        metrics: What `compute_metrics` returned.
        gates: How each gate was judged.
        lineage: What the model was made from.
        verification: What loading it in a new process gave; empty when it was not tried.
    """
    environment = Environment(
        loader=PackageLoader("mllm_assets.evaluation"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = _cell
    text = environment.get_template("model_card.md.jinja").render(
        front_matter=yaml.safe_dump(
            front_matter(recipe_name, metrics, lineage), sort_keys=False, allow_unicode=True, width=120
        ),
        recipe_name=recipe_name,
        version=version,
        run=run,
        metrics=metrics,
        tables={entry: _metric_table(scored) for entry, scored in metrics["entries"].items()},
        gates=gates,
        lineage=lineage,
        recipe_yaml=yaml.safe_dump(dict(lineage["recipe"]), sort_keys=False, allow_unicode=True),
        verification=verification,
    )
    write_text_atomic(directory / "README.md", redacted(text))


def front_matter(recipe_name: str, metrics: Mapping[str, Any], lineage: Lineage) -> dict[str, Any]:
    """The card's metadata in the Hub's terms; names that the Hub cannot resolve are left out of it."""
    pretrained = lineage["pretrained_model"]
    datasets = sorted({hub_id for dataset in lineage["datasets"] if (hub_id := dataset.get("hub_id"))})
    result: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    result["license"] = pretrained.get("license") or "other"
    if pretrained.get("hub_id"):
        result |= {"base_model": pretrained.get("hub_id"), "base_model_relation": "finetune"}
    if datasets:
        result["datasets"] = datasets
    result["tags"] = ["mllm-assets", recipe_name]
    hub_ids = {dataset["entry"]: dataset.get("hub_id") for dataset in lineage["datasets"]}
    results = [
        {
            "task": {"type": "image-text-to-text"},
            "dataset": {"name": entry, "type": hub_ids.get(entry) or entry},
            "metrics": [
                {"type": metric, "value": round(scored["models"]["tuned"][metric], 6)}
                for metric in SHOWN
                if metric in scored["models"]["tuned"]
            ],
        }
        for entry, scored in metrics["entries"].items()
    ]
    return result | {"model-index": [{"name": recipe_name, "results": results}]}


def _metric_table(scored: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows of one entry's results."""
    models = [model for model in COLUMNS if model in scored["models"]]
    gains = scored["gains"].get("tuned_over_base", {})
    rows = [["metric", *(COLUMNS[model] for model in models), "gain over base, 95 % interval"]]
    for metric in SHOWN:
        values = [scored["models"][model].get(metric) for model in models]
        if any(value is not None for value in values):
            figures = ["" if value is None else f"{value:.4g}" for value in values]
            rows.append([metric, *figures, gain_text(gains.get(metric))])
    return rows


def _cell(value: Any) -> str:
    """Text that stays within one cell of a Markdown table."""
    return " ".join(str("" if value is None else value).split()).replace("|", "\\|")
