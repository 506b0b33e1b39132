"""The released model's README: front matter that the Hugging Face Hub reads, results, and where the model came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from mllm_assets.artifacts import write_text_atomic
from mllm_assets.evaluation.forgetting import forgetting_markdown
from mllm_assets.evaluation.gates import GateResult
from mllm_assets.evaluation.intervals import gain_text
from mllm_assets.evaluation.scores import in_order
from mllm_assets.redaction import redacted
from mllm_assets.releases.approvals import Decision
from mllm_assets.releases.cost import total

COLUMNS = {"base": "base model", "tuned": "this model", "most_common_answer": "most common training answer"}


class HubLineage(TypedDict):
    """Each only where it is known."""

    hub_id: NotRequired[str | None]
    revision: NotRequired[str | None]
    license: NotRequired[str | None]


class BaseModelLineage(HubLineage):
    """A model that training started from."""

    name: str
    fingerprint: str


class DatasetLineage(HubLineage):
    """One entry of `dataset_info.json`; `use` is "train", "validate" (it may have chosen) or "evaluate" (it judged)."""

    entry: str
    use: str
    digest: str
    num_rows: NotRequired[int | None]
    source: NotRequired[str | None]


class Origin(TypedDict):
    """What a recipe started from."""

    base_model: BaseModelLineage  # what was fine-tuned; has a Hub id only where it is the Hub's, byte for byte
    pretrained_model: BaseModelLineage  # what the first of a chain of recipes started from; often the same


class Lineage(Origin):
    """What a model was made from and how to reproduce it."""

    datasets: Sequence[DatasetLineage]
    recipe: Mapping[str, Any]  # the recipe's keys as written
    versions: Mapping[str, str]  # library -> version
    command: str
    costs: NotRequired[Mapping[str, Mapping[str, float]]]  # asset -> figures of `worker.usage.Usage`
    leaks: Sequence[str]  # what it may have been trained on and is evaluated on; see data.curate.leaks
    sweep: NotRequired[Mapping[str, Any] | None]  # the `ChosenBy` of its values, where a sweep chose them
    also_chose: NotRequired[Sequence[str]]  # entries that judge, although checkpoints and settings were chosen by them


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """The contents of a release's `README.md`."""

    recipe_name: str
    version: str
    run: Mapping[str, Any]  # the training run's manifest
    metrics: Mapping[str, Any]  # from `compute_metrics`
    gates: Sequence[GateResult]
    lineage: Lineage
    decisions: Sequence[Decision]  # of people, about this and earlier models; the oldest first
    verification: Mapping[str, Any]  # the result of loading it in a new process; empty if that was skipped

    def write(self, directory: Path) -> None:
        """Write it into the release being built."""
        loader = PackageLoader("mllm_assets.releases")
        environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.filters["cell"] = _cell
        metadata = front_matter(self.recipe_name, self.metrics, self.lineage)
        text = environment.get_template("model_card.md.jinja").render(
            {field.name: getattr(self, field.name) for field in fields(self)},
            front_matter=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=120),
            total_cost=total(self.lineage.get("costs", {})),
            tables={entry: _metric_table(scored) for entry, scored in self.metrics["entries"].items()},
            forgetting=forgetting_markdown(self.metrics.get("forgetting") or {}),
            recipe_yaml=yaml.safe_dump(dict(self.lineage["recipe"]), sort_keys=False, allow_unicode=True),
        )
        write_text_atomic(directory / "README.md", redacted(text))


def without_front_matter(card: str) -> str:
    """A card's text without the metadata for the Hub before it, which is no Markdown."""
    return card.partition("\n---\n")[2].lstrip() if card.startswith("---\n") else card


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
                for metric in in_order(scored["models"]["tuned"])
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
    for metric in in_order(dict.fromkeys(name for model in models for name in scored["models"][model])):
        values = [scored["models"][model].get(metric) for model in models]
        figures = ["" if value is None else f"{value:.4g}" for value in values]
        rows.append([metric, *figures, gain_text(gains.get(metric))])
    return rows


def _cell(value: Any) -> str:
    """Text that stays within one cell of a Markdown table."""
    return " ".join(str("" if value is None else value).split()).replace("|", "\\|")
