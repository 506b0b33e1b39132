"""`<dataset>/raw`: the source at a pinned revision."""

import dagster as dg

from mllm_assets.artifacts import digest_json
from mllm_assets.components.resources import ProjectResource, failures_for_people
from mllm_assets.components.source_watch import LISTING
from mllm_assets.data.listing import is_watchable, list_source
from mllm_assets.data.sources import ingest
from mllm_assets.data.spec import DatasetSpec, as_json


def raw_code_version(spec: DatasetSpec) -> str:
    """What decides which rows are ingested: of a Hub dataset only as many are fetched as the splits ask for."""
    sampled = as_json(spec.split) if spec.source.kind == "huggingface" else None
    return digest_json([as_json(spec.source), sampled])[:16]


def raw_asset(spec: DatasetSpec, description: str, license: str) -> dg.AssetsDefinition:
    kinds = {"parquet"} | ({"huggingface"} if spec.source.kind == "huggingface" else set())

    @dg.asset(
        key=[spec.name, "raw"],
        group_name="ingest",
        kinds=kinds,
        code_version=raw_code_version(spec),
        description=f"{description}\n\nThe source at a pinned revision, image bytes undecoded.".strip(),
    )
    def raw(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        with failures_for_people():
            # before it is read: a file that changes meanwhile makes it outdated
            seen = list_source(spec.source, project.layout.root) if is_watchable(spec.source) else None
            result = ingest(spec, project.layout)
        return project.recorded(
            context,
            dg.MaterializeResult(
                data_version=dg.DataVersion(result.digest),
                metadata={
                    "num_samples": result.num_samples,
                    "size_mib": round(result.num_bytes / 2**20, 2),
                    "revision": result.revision or "",
                    "hub_id": spec.source.repo,
                    "license": license,
                    **({LISTING: seen.digest} if seen else {}),
                    "path": project.layout.relative(result.directory),
                },
            ),
        )

    return raw
