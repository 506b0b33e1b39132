"""The asset `<dataset>/corrections`: what people decided about samples, between the source and the splits."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from mllm_assets.artifacts import digest_json
from mllm_assets.components.assets.lineage import upstream_path
from mllm_assets.components.assets.step import step
from mllm_assets.components.reporting import in_window
from mllm_assets.components.resources import ProjectResource
from mllm_assets.data.curate.corrected import SettledResult, answering, settle
from mllm_assets.data.curate.corrections import read_corrections
from mllm_assets.data.ingest.spec import DatasetSpec
from mllm_assets.data.quality.report import markdown_table
from mllm_assets.layout import Layout

DECISIONS = "decisions_digest"  # of the asset's metadata: the file of decisions when it was read
MAX_SHOWN = 20


def corrections_asset(spec: DatasetSpec) -> dg.AssetsDefinition:
    raw_key = dg.AssetKey([spec.name, "raw"])

    @dg.asset(
        key=[spec.name, "corrections"],
        group_name="curate",
        kinds={"json"},
        deps=[raw_key],
        code_version=digest_json(answering(spec))[:16],
        description="What people decided about samples (another answer, drop, keep), from "
        f"corrections/{spec.name}.jsonl: `mllm-assets review {spec.name}`, or the board. The splits are made with it, "
        "and no sample changes sides by it.",
    )
    @step
    def corrections(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        result = settle(spec, project.layout, upstream_path(context, raw_key, project))
        if result.unmatched:
            context.log.warning(
                f"{len(result.unmatched)} decisions match no sample of this source any more, and change nothing: "
                f"mllm-assets review {spec.name} unmatched"
            )
        return dg.MaterializeResult(
            data_version=dg.DataVersion(result.digest),
            metadata=corrections_metadata(result, project.layout, spec.name),
        )

    return corrections


def corrections_metadata(result: SettledResult, layout: Layout, dataset: str) -> Mapping[str, Any]:
    """How many decisions hold, those that do not, and the last that were made."""
    newest = read_corrections(layout, dataset)[: -MAX_SHOWN - 1 : -1]
    made = [(one.when, one.who, one.sample_id, one.action, one.old, one.new, one.why) for one in newest]
    left = [(one.sample_id, f"{one.action} by {one.who}", why) for one, why in result.unmatched[:MAX_SHOWN]]
    columns = ("when", "who", "sample", "what", "answer of the source", "new answer", "why")
    return {
        "num_relabelled": result.num_relabelled,
        "num_dropped": result.num_dropped,
        "num_kept": result.num_kept,
        "num_unmatched": len(result.unmatched),
        "newest": in_window(markdown_table(columns, made) if made else ""),
        "unmatched": in_window(markdown_table(("sample", "decision", "why it does not hold"), left) if left else ""),
        DECISIONS: result.decisions_digest,
        "path": layout.relative(result.directory),
    }
