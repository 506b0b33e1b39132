"""Any model that can be named, asked about any entry: what it scores there, without a recipe that judges itself so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets import __version__
from mllm_assets.artifacts import digest_json, parse_manifest
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import ModelError
from mllm_assets.evaluation.gallery import GALLERY
from mllm_assets.evaluation.metrics import MOST_COMMON, compute_metrics
from mllm_assets.evaluation.scores import in_order
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.families.family import family_of, require_template
from mllm_assets.layout import Layout
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.runs.models import NamedModel, checkpoint_digest, is_checkpoint, model_fingerprint
from mllm_assets.training.runs.run_file import read_starting_model
from mllm_assets.worker.tasks import Accelerator, EvaluateTask, EvaluationSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What a model scored; `entries[entry]` holds `num_samples`, `most_common_answer`, and of both `metrics[name]`.

    The most common answer is that of the entry itself, since it is not known what the model was trained on.
    """

    model: str
    entries: Mapping[str, Mapping[str, Any]]
    directory: Path

    def to_dict(self) -> dict[str, Any]:
        """Model and figures, JSON-able."""
        return {"model": self.model, "entries": dict(self.entries)}

    @property
    def gallery(self) -> Path:
        """The page of its answers."""
        return self.directory / GALLERY


def evaluation_of_model(
    layout: Layout,
    model: NamedModel,
    entries: Sequence[str],
    *,
    settings: EvaluationSettings,
    accelerator: Accelerator,
) -> EvaluateTask:
    """Asks a model about entries of `data/dataset_info.json`, in a directory named by all that answers depend on.

    Raises:
        RecipeError: No such entry, or the turn format is of another family. Names the nearest.
        ModelError: The model cannot be loaded.
    """
    spec = _spec(model, entries)
    dataset = Dataset.of_recipe(spec, layout.root, read_part=None)
    data = {name: dataset.entry(name).digest for name in spec.eval_entries}
    of_checkpoint = is_checkpoint(model.directory)
    digest = checkpoint_digest(model.directory) if of_checkpoint else model_fingerprint(model.directory)
    identity = {"engine_version": __version__, "model": digest, "data": data, **settings.conditions(spec)}
    return EvaluateTask(
        recipe=spec,
        entries=spec.eval_entries,
        recipe_name=model.name,
        model_dir=model.directory,
        base_model_dir=model.directory,
        data_dir=dataset.data_dir,
        media_dir=dataset.media_dir,
        data_digests=data,
        model_digests={"tuned": digest},
        directory=layout.evaluations / digest_json(identity)[:16],
        settings=settings,
        models=("tuned",),
        rows_root=layout.rows,
        accelerator=accelerator,
    )


def scores_of(task: EvaluateTask, root: Path) -> Scored:
    """The scores of an evaluation that was made.

    Raises:
        IntegrityError: It was not, or its table is damaged.
        DataError: There is no row.
    """
    predictions = read_predictions(task.directory)
    dataset = Dataset.of_recipe(task.recipe, root, read_part=None)
    answers = [text for name in task.entries for text in dataset.entry(name).answers]
    scored = compute_metrics(predictions, answers)["entries"]
    entries = {name: _facts(one) for name, one in scored.items()}
    return Scored(model=task.recipe_name, entries=entries, directory=task.directory)


def _facts(scored: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {"metrics": scored["models"]["tuned"], "metrics_of_most_common_answer": scored["models"][MOST_COMMON]}
    return {name: scored[name] for name in ("num_samples", "most_common_answer")} | metrics


def _spec(model: NamedModel, entries: Sequence[str]) -> TrainSpec:
    """The entries as a recipe has them, asked as the model's training did, or as its family is usually asked."""
    turns = model.turns
    family = family_of(_model_type(model.directory))
    template = turns.template or next(iter(family.templates))
    require_template(template, family, str(model.directory))
    names = (name for name in TurnSettings.__slots__ if name not in ("template", "system"))
    joined = ",".join(entries)
    return TrainSpec(
        model_name_or_path=str(model.directory),
        do_train=True,
        dataset=joined,
        eval_dataset=joined,
        media_dir=model.media_dir,
        template=template,
        default_system=turns.system,
        **{name: getattr(turns, name) for name in names},
    )


def _model_type(directory: Path) -> str:
    if is_checkpoint(directory):
        directory = read_starting_model(directory.parent).model_dir
    path = directory / "config.json"
    config = parse_manifest(path.read_bytes(), str(path), "Download or make the model again.")
    if not isinstance(kind := config.get("model_type"), str):
        raise ModelError(f"{path} has no model_type, so it is not a model's. Download or make the model again.")
    return kind


def describe(scored: Scored) -> str:
    """Its figures as a table for a terminal, an entry after another."""
    lines = []
    for entry, facts in scored.entries.items():
        own, constant = facts["metrics"], facts["metrics_of_most_common_answer"]
        title = f"{entry}, {facts['num_samples']} samples"
        width = max(28, len(title) + 2)
        lines.append(f"{title:<{width}}{'this model':>12}{'most common answer':>22}")
        for name in in_order(own):
            beside = f"{constant[name]:>22.4f}" if name in constant else ""
            lines.append(f"  {name:<{width - 2}}{own[name]:>12.4f}{beside}")
        lines.append(f"  (the most common answer of {entry} is {facts['most_common_answer']!r})")
    return "\n".join(lines)
