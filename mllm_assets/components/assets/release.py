"""`<recipe>/released_model` and `<recipe>/hub_model`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dagster as dg

from mllm_assets.artifacts import read_manifest
from mllm_assets.components.assets.lineage import (
    as_trained,
    find_leaks,
    line_versions,
    model_directory,
    pull_data,
    upstream,
    upstream_path,
)
from mllm_assets.components.assets.step import step
from mllm_assets.components.reporting import in_window, link, table
from mllm_assets.components.resources import AcceleratorResource, ProjectResource
from mllm_assets.components.wiring import Node
from mllm_assets.data.curate.leaks import require_sound_versions
from mllm_assets.data.sharegpt.dataset import Dataset, Entry
from mllm_assets.evaluation.metric_page import gates_markdown
from mllm_assets.layout import Layout
from mllm_assets.project.read import materialize_command
from mllm_assets.releases.cost import line_costs, total
from mllm_assets.releases.hub_push import PushSpec, files_to_push, push, require_current
from mllm_assets.releases.model_card import DatasetLineage, Lineage, without_front_matter
from mllm_assets.releases.publish import Candidate, publish, read_judgement
from mllm_assets.releases.versions import Release, current_release
from mllm_assets.training.runs.plan import shown_overrides
from mllm_assets.training.runs.sweep_result import chosen_by
from mllm_assets.worker.tasks import VerifyTask
from mllm_assets.worker.usage import PREFIX


def released_model_asset(node: Node) -> dg.AssetsDefinition:
    """The model that passed its gates. Gates and leaks are checked here again."""
    gates = node.gates

    @dg.asset(
        key=node.key("released_model"),
        group_name="release",
        kinds={"pytorch"},
        deps=[node.key("eval_metrics"), node.key("checkpoint")],
        pool="gpu",
        description=f"{node.name}: a plain Hugging Face directory with a model card; a release never changes.",
    )
    @step
    def released_model(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        layout = project.layout
        if mirror := project.mirror(context):
            mirror.follow_current(node.name, all_versions=True)  # the next version's number comes after all others
        pull_data(context, [*node.data, *node.ancestor_data], project)
        run_dir = upstream_path(context, node.key("checkpoint"), project)
        metrics_dir = upstream_path(context, node.key("eval_metrics"), project)
        judgement = read_judgement(metrics_dir, layout)
        spec, base_model_dir = as_trained(context, node), model_directory(context, node, project)
        dataset = Dataset.of_recipe(spec, layout.root)
        require_sound_versions(dataset, [*spec.train_entries, *spec.eval_entries])
        leaks = find_leaks(context, node, project, dataset, judgement.data_digests)
        for text in leaks:
            context.log.warning(text)
        trained, judging = read_manifest(run_dir)["data_digests"], judgement.data_digests
        digests = {
            "train": {name: trained.get(name, "") for name in spec.train_entries},
            "validate": {name: trained.get(name, "") for name in spec.eval_entries if name not in judging},
            "evaluate": judging,
        }
        costs = line_costs(project.quality_store, line_versions(context, node))
        sweep = chosen_by(layout, read_manifest(run_dir)["fingerprint"])
        lineage: Lineage = {
            **_lineage(context, node, dataset, digests, leaks),
            "costs": costs,
            "sweep": asdict(sweep) if sweep else None,
        }

        def verify(directory: Path) -> Mapping[str, Any]:
            task = VerifyTask(directory=directory, checkpoint_dir=run_dir / "model", base_model_dir=base_model_dir)
            return gpu.run(context, task).facts()

        candidate = Candidate(recipe_name=node.name, run_dir=run_dir, judgement=judgement, lineage=lineage)
        release = publish(candidate, gates, layout, allow_leakage=node.settings.allow_leakage, verify=verify)
        current = current_release(layout, node.name)
        if current != release:
            context.log.warning(
                f"{release.version} already holds this model, and was rolled back. To make it the current release "
                f"again: mllm-assets releases rollback {node.name} {release.version}"
            )
        result = _release_result(release, current, layout, leaks)
        of_line = {name.replace(PREFIX, "line_"): value for name, value in total(costs).as_metadata().items()}
        return result._replace(metadata={**(result.metadata or {}), **of_line})

    return released_model


def _release_result(
    release: Release, current: Release | None, layout: Layout, leaks: Sequence[str]
) -> dg.MaterializeResult:
    card = (release.directory / "README.md").read_text(encoding="utf-8")
    return dg.MaterializeResult(
        data_version=dg.DataVersion(release.digest),
        metadata={
            "version": release.version,
            "current": current.version if current else "",
            "model_card": in_window(without_front_matter(card)),
            "path": layout.relative(release.directory),
            "leaks": list(leaks),
            "gates": in_window(gates_markdown(read_manifest(release.directory)["gates"])),
        },
    )


def _lineage(
    context: dg.AssetExecutionContext,
    node: Node,
    dataset: Dataset,
    digests: Mapping[str, Mapping[str, str]],
    leaks: Sequence[str],
) -> Lineage:
    """What the model was made from, for its card; `digests` of the entries of each use, see `DatasetLineage`."""
    origin = upstream(context, node.key("checkpoint"))  # as it was when it trained
    overrides = origin.get("overrides") or {}
    command = materialize_command(f"{node.name}/released_model" if overrides else node.name)
    libraries = ("mllm-assets", "torch", "transformers", "accelerate", "peft", "dagster")
    return {
        "base_model": origin["base_model"],
        "pretrained_model": origin["pretrained_model"],
        "datasets": [
            _dataset(context, node, dataset.entry(entry), use, digest)
            for use, entries in digests.items()
            for entry, digest in entries.items()
        ],
        "recipe": {**node.recipe.values, **overrides},
        "versions": {name: version(name) for name in libraries},
        "command": f"{command} {shown_overrides(overrides)}".rstrip(),
        "leaks": leaks,
        "also_chose": [entry for entry in digests["evaluate"] if entry in node.eval_data],
    }


def _dataset(context: dg.AssetExecutionContext, node: Node, entry: Entry, use: str, digest: str) -> DatasetLineage:
    """An entry that trained, chose or judged the model, and its source; of one written by hand that is unknown."""
    known_keys = {**node.train_data, **node.eval_data}
    version = entry.version
    name = known_keys[entry.name].path[0] if entry.name in known_keys or not version else version.parent.name
    raw = dg.AssetKey([name, "raw"])
    known = context.instance.get_latest_materialization_event(raw) is not None
    facts = upstream(context, raw) if known else {}
    return {
        "entry": entry.name,
        "use": use,
        "digest": digest,
        "num_rows": entry.num_rows,
        "source": f"the dataset {raw.path[0]}" if known else None,
        "hub_id": facts.get("hub_id") or None,
        "revision": facts.get("revision") or None,
        "license": facts.get("license") or None,
    }


def hub_model_asset(node: Node, spec: PushSpec) -> dg.AssetsDefinition:
    """The release on the Hub; a dry run lists what would be pushed, without the network."""

    @dg.asset(
        key=node.key("hub_model"),
        group_name="release",
        kinds={"huggingface"},
        deps=[node.key("released_model")],
        description=f"{node.name}: the current release {'as it would be pushed' if spec.dry_run else 'pushed'} to "
        f"{spec.repo_id}{f' at {spec.revision}' if spec.revision else ''} on the Hugging Face Hub.",
    )
    @step
    def hub_model(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        layout = project.layout
        release_dir = upstream_path(context, node.key("released_model"), project)
        require_current(layout, node.name, release_dir)
        files = files_to_push(release_dir)
        pushed = None if spec.dry_run else push(release_dir, spec)
        if spec.dry_run:
            context.log.info(f"Dry run: nothing was sent. push_to_hub.dry_run: false pushes to {spec.repo_id}.")
        columns = {"file": "string", "num_bytes": "int"}
        return dg.MaterializeResult(
            data_version=dg.DataVersion(pushed.commit if pushed else f"dry run of {release_dir.name}"),
            metadata={
                "dry_run": spec.dry_run,
                "repo_id": spec.repo_id,
                "private": spec.private,
                "revision": spec.revision or "main",
                "version": release_dir.name,
                "files": table([{"file": name, "num_bytes": size} for name, size in files.items()], columns),
                "num_files": len(files),
                "size_mib": round(sum(files.values()) / 2**20, 2),
                **({"commit": pushed.commit, "commit_url": link(pushed.commit_url)} if pushed else {}),
            },
        )

    return hub_model
