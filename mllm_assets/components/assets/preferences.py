"""The asset `<recipe>/preferences`: pairs of references and the model's own wrong answers."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import dagster as dg

from mllm_assets import __version__
from mllm_assets.artifacts import digest_json
from mllm_assets.components.assets.lineage import as_trained, pull_data, upstream, upstream_path
from mllm_assets.components.assets.step import step
from mllm_assets.components.reporting import in_window
from mllm_assets.components.resources import AcceleratorResource, ProjectResource
from mllm_assets.components.wiring import PREFERENCES, Node
from mllm_assets.data.quality.report import markdown_table
from mllm_assets.data.sharegpt.dataset import Dataset, media_dir_of
from mllm_assets.evaluation.own_mistakes import first_pairs, preferences_entry, publish_mistakes
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.worker.tasks import EvaluateTask, EvaluationSettings


def preferences_asset(node: Node) -> dg.AssetsDefinition:
    """Ask the trained model about the rows that it was trained on, and keep what it gets wrong."""
    chosen: EvaluationSettings = node.settings.evaluation.to_spec()
    settings = replace(chosen, max_samples=None, unrelated=())
    keys = sorted(set(node.train_data.values()))

    @dg.asset(
        key=node.key(PREFERENCES),
        group_name="train",
        kinds={"json"},
        deps=[node.key("checkpoint"), *keys],
        pool="gpu",
        code_version=digest_json(asdict(settings))[:16],
        description=f"{node.name}: each training sample that the model still answers wrongly, as a pair of the "
        f"reference and its answer; the entry {preferences_entry(node.name)}, for a recipe of stage: dpo.",
    )
    @step
    def preferences(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        layout, spec = project.layout, as_trained(context, node)
        pull_data(context, keys, project)
        dataset = Dataset.of_recipe(spec, layout.root, read_part=None)
        digests = {name: dataset.entry(name).digest for name in spec.train_entries}
        upstream_path(context, node.key("checkpoint"), project)
        tuned = upstream(context, node.key("checkpoint"))
        lineage = {"engine_version": __version__, "weights_digest": tuned["data_version"], "data_digests": digests}
        directory = layout.own_answers(node.name, digest_json([lineage, settings.conditions(spec)])[:16])
        gpu.run(context, _asking(node, spec, settings, project, tuned, digests, directory))
        made = publish_mistakes(
            layout, node.name, dataset, directory,
            max_new_tokens=settings.max_new_tokens, lineage={**lineage, "model_path": tuned["model_path"]},
        )  # fmt: skip
        shown = first_pairs(made.directory)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(made.digest),
            metadata={
                "pairs": in_window(markdown_table(("sample", "reference", "what the model said"), shown)),
                "num_asked": made.num_asked,
                "num_pairs": made.num_pairs,
                "left_out": dg.MetadataValue.json(dict(made.left_out)),
                "weights_digest": tuned["data_version"],
                "data_digests": dg.MetadataValue.json(digests),
                "path": layout.relative(made.directory),
            },
        )

    return preferences


def _asking(
    node: Node,
    spec: TrainSpec,
    settings: EvaluationSettings,
    project: ProjectResource,
    tuned: Mapping[str, Any],
    data_digests: dict[str, str],
    directory: Path,
) -> EvaluateTask:
    """The worker's task: the tuned model answers what it was trained on."""
    layout = project.layout
    model_dir = layout.root / tuned["model_path"]
    return EvaluateTask(
        recipe=spec,
        recipe_name=node.name,
        entries=tuple(data_digests),
        model_dir=model_dir,
        base_model_dir=model_dir,
        data_dir=layout.root / spec.dataset_dir,
        media_dir=media_dir_of(spec, layout.root),
        data_digests=data_digests,
        model_digests={"tuned": tuned["data_version"]},
        directory=directory,
        settings=settings,
        models=("tuned",),
        features_root=layout.features if node.has_features else None,
    )
