"""`<dataset>/sample_quality`: what was measured of each sample, and why it is rejected."""

import dagster as dg

from mllm_assets.artifacts import digest_json
from mllm_assets.components.lineage import upstream_path
from mllm_assets.components.reporting import counts_table
from mllm_assets.components.resources import ProjectResource, failures_for_people
from mllm_assets.data.spec import DatasetSpec, as_json
from mllm_assets.quality.assess import assess
from mllm_assets.quality.report import write_report


def sample_quality_asset(spec: DatasetSpec) -> dg.AssetsDefinition:
    raw_key = dg.AssetKey([spec.name, "raw"])

    @dg.asset(
        key=[spec.name, "sample_quality"],
        group_name="curate",
        kinds={"duckdb"},
        deps=[raw_key],
        code_version=digest_json([as_json(spec.quality), spec.answer])[:16],
        description="One row a sample in data/quality.duckdb: dimensions, brightness, blur, entropy, hashes, caption "
        "statistics, near-duplicates, and the reason where a sample is rejected.",
    )
    def sample_quality(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        with failures_for_people():
            raw = upstream_path(context, raw_key, project)
            if mirror := project.mirror(context):
                mirror.bring_history(spec.name)
            result = assess(spec, project.layout, raw, context.run.run_id)
            report = write_report(raw, result.directory)
        return project.recorded(
            context,
            dg.MaterializeResult(
                data_version=dg.DataVersion(result.digest),
                metadata={
                    "num_samples": result.num_samples,
                    "num_rejected": result.num_rejected,
                    "num_duplicates": result.num_duplicates,
                    "num_decoded": result.num_decoded,
                    "reject_reasons": counts_table(result.reject_reasons, "reason"),
                    "flags": counts_table(result.flags, "flag"),
                    "report": dg.MetadataValue.md(report.markdown),
                    "report_path": project.layout.relative(report.html),
                    "path": project.layout.relative(result.directory),
                },
            ),
        )

    return sample_quality
