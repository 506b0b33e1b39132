"""The assets of one dataset: `raw`, `sample_quality`, `train`, `val` and `test`, `dataset_info`; see `corrections`."""

from typing import Any

import dagster as dg

from mllm_assets.artifacts import digest_json
from mllm_assets.components.assets.lineage import upstream_path
from mllm_assets.components.assets.step import step
from mllm_assets.components.automation.sources import LISTING, SOURCE
from mllm_assets.components.reporting import check_results, counts_table, in_window, link, with_page
from mllm_assets.components.resources import ProjectResource
from mllm_assets.data.curate.checks import counts_add_up, every_image_has_a_placeholder, splits_share_no_image
from mllm_assets.data.curate.publish import side_files
from mllm_assets.data.curate.register import register
from mllm_assets.data.curate.sample_page import REPORT
from mllm_assets.data.curate.splits import SplitResult, no_test_text, split
from mllm_assets.data.curate.variety import rows_say_different_things
from mllm_assets.data.ingest.paths import is_watchable, list_source
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.data.ingest.spec import DatasetSpec, as_json
from mllm_assets.data.ingest.split_spec import SIDES, TEST, TRAIN, VAL
from mllm_assets.data.quality.assess import assess
from mllm_assets.data.quality.preview import preview_rows, preview_source
from mllm_assets.data.quality.report import write_report
from mllm_assets.layout import Layout

COUNTS = ("num_raw", "num_train", "num_val", "num_test", "num_unused", "num_rejected", "num_augmented", "num_corrected")
CHECKS = {
    "counts_add_up": "Every sample of the source trains, validates, tests, is unused or is rejected, with a reason.",
    "every_image_has_a_placeholder": "Each row has as many <image> placeholders as images, and its files exist.",
    "rows_say_different_things": "Neither all answers nor half of them are equal, and rows ask questions of their own.",
    "splits_share_no_image": "No image, nor a near-duplicate of it, is in two splits.",
}


def raw_code_version(spec: DatasetSpec) -> str:
    """A digest of what decides which rows are ingested; from the Hub only as many are fetched as the splits need."""
    sampled = as_json(spec.split) if spec.source.is_of_hub else None
    return digest_json([as_json(spec.source), sampled])[:16]


def raw_asset(spec: DatasetSpec, description: str, license: str) -> dg.AssetsDefinition:
    kinds = {"parquet"} | ({"huggingface"} if spec.source.is_of_hub else set())

    @dg.asset(
        key=[spec.name, "raw"],
        group_name="ingest",
        kinds=kinds,
        code_version=raw_code_version(spec),
        metadata={SOURCE: dg.MetadataValue.json(as_json(spec.source))},
        description=f"{description}\n\nThe source at a pinned revision, image bytes undecoded.".strip(),
    )
    @step
    def raw(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        # listed before it is read, so that a file that changes meanwhile makes it outdated
        listing = list_source(spec.source, project.layout.root) if is_watchable(spec.source) else None
        result = ingest(spec, project.layout)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(result.digest),
            metadata={
                "num_samples": result.num_samples,
                "size_mib": round(result.num_bytes / 2**20, 2),
                "revision": result.revision or "",
                "hub_id": spec.source.repo,
                "license": license,
                "rows": in_window(preview_source(result.directory, spec.quality.decode_limits)),
                **({LISTING: listing.digest} if listing else {}),
                "path": project.layout.relative(result.directory),
            },
        )

    return raw


def dataset_info_asset(spec: DatasetSpec) -> dg.AssetsDefinition:
    keys = [dg.AssetKey([spec.name, side]) for side in SIDES]

    @dg.asset(
        key=[spec.name, "dataset_info"],
        group_name="curate",
        kinds={"json"},
        deps=keys,
        description=f"The entries {', '.join(spec.entries.values())} of data/dataset_info.json.",
    )
    @step
    def dataset_info(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        version = upstream_path(context, keys[0], project)
        result = register(spec, project.layout, version)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(result.digest),
            metadata={
                "entries": dg.MetadataValue.json(result.entries),
                "path": project.layout.relative(project.layout.dataset_info),
            },
        )

    return dataset_info


def sample_quality_asset(spec: DatasetSpec) -> dg.AssetsDefinition:
    raw_key = dg.AssetKey([spec.name, "raw"])

    @dg.asset(
        key=[spec.name, "sample_quality"],
        group_name="curate",
        kinds={"duckdb"},
        deps=[raw_key],
        code_version=digest_json([as_json(spec.quality), spec.answer])[:16],
        description="One row per sample in data/quality.duckdb: dimensions, brightness, blur, entropy, hashes, caption "
        "statistics, near-duplicates, and the reason where a sample is rejected.",
    )
    @step
    def sample_quality(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        raw = upstream_path(context, raw_key, project)
        if mirror := project.mirror(context):
            mirror.pull_history(spec.name)
        result = assess(spec, project.layout, raw, context.run.run_id)
        report = write_report(raw, result.directory)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(result.digest),
            metadata={
                "num_samples": result.num_samples,
                "num_rejected": result.num_rejected,
                "num_duplicates": result.num_duplicates,
                "num_decoded": result.num_decoded,
                "reject_reasons": counts_table(result.reject_reasons, "reason"),
                "flags": counts_table(result.flags, "flag"),
                "report": with_page(report.html, report.markdown, project.layout),
                "report_path": link(str(report.html)),
                "path": project.layout.relative(result.directory),
            },
        )

    return sample_quality


def splits_asset(spec: DatasetSpec) -> dg.AssetsDefinition:
    above = [dg.AssetKey([spec.name, name]) for name in ("raw", "sample_quality", "corrections")]
    keys = {side: dg.AssetKey([spec.name, side]) for side in SIDES}
    leak, variety = "splits_share_no_image", "rows_say_different_things"
    checks = {TRAIN: ["counts_add_up", variety], VAL: [leak], TEST: [leak]}

    @dg.multi_asset(
        name=f"{spec.name}__splits",
        specs=[
            dg.AssetSpec(
                keys[side],
                deps=above,
                group_name="curate",
                kinds={"parquet" if spec.output.format == "parquet" else "json"},
                code_version=digest_json(as_json(spec))[:16],
                description=_side_description(spec, side),
            )
            for side in SIDES
        ],
        check_specs=[
            dg.AssetCheckSpec(name, asset=keys[side], blocking=True, description=CHECKS[name])
            for side, names in checks.items()
            for name in ("every_image_has_a_placeholder", *names)
        ],
    )
    @step
    def splits(
        context: dg.AssetExecutionContext, project: ProjectResource
    ) -> tuple[dg.MaterializeResult, dg.MaterializeResult, dg.MaterializeResult]:
        raw, quality, corrections = (upstream_path(context, key, project) for key in above)
        if mirror := project.mirror(context):
            mirror.pull_history(spec.name)  # so that no sample changes sides when another machine splits
        result = split(spec, project.layout, raw, quality, context.run.run_id, corrections)
        _warn_of_copies(context, result)
        if not result.num_test:
            context.log.warning(no_test_text(spec, result.num_unused))
        data = project.layout.data
        outcomes = {
            "every_image_has_a_placeholder": every_image_has_a_placeholder(result.directory, data),
            "counts_add_up": counts_add_up(result),
            leak: splits_share_no_image(result.directory, data, store=project.quality_store),
            variety: rows_say_different_things(result.directory),
        }
        # a given split may have duplicates on two sides: a warning here, refused by the release
        only_warn = {variety, leak} if spec.split_is_given else {variety}
        metadata = _split_metadata(spec, result, project.layout)

        def made(side: str) -> dg.MaterializeResult:
            its = {name: outcomes[name] for name in ("every_image_has_a_placeholder", *checks[side])}
            return dg.MaterializeResult(
                asset_key=keys[side],
                data_version=dg.DataVersion(getattr(result, f"{side}_digest") or "no samples"),
                check_results=check_results(keys[side], its, only_warn=only_warn),
                metadata=metadata[side],
            )

        return made(TRAIN), made(VAL), made(TEST)

    return splits


def _warn_of_copies(context: dg.AssetExecutionContext, result: SplitResult) -> None:
    if left_out := result.copies_left_out:
        context.log.warning(
            "Rows whose words name what `augment` changes have no such copies: "
            f"{', '.join(f'{fate} {number}' for fate, number in left_out.items())}. Where the words stay "
            "true, name the operation in `augment_all_rows` too."
        )


def _split_metadata(spec: DatasetSpec, result: SplitResult, layout: Layout) -> dict[str, dict[str, Any]]:
    """The metadata of each side."""
    files, page = side_files(result.directory, spec.output.format), result.directory / REPORT
    shared = {
        **{name: getattr(result, name) for name in COUNTS},
        "num_copies_left_out": sum(result.copies_left_out.values()),
        "unused_reasons": counts_table(result.unused_reasons, "reason"),
        "augmentations": counts_table(result.augmentations, "augmentation"),
        "report_path": link(str(layout.data / spec.name / REPORT)),
        "path": layout.relative(result.directory),
    }
    return {
        side: {
            "num_samples": (num_rows := getattr(result, f"num_{side}")),
            "rows": with_page(page, preview_rows(files[side], layout.data, num_rows), layout) if side in files else "",
            **shared,
        }
        for side in SIDES
    }


def _side_description(spec: DatasetSpec, side: str) -> str:
    use = {
        TRAIN: "The training split as ShareGPT rows.",
        VAL: "The validation split, by which checkpoints and settings are chosen",
        TEST: "The test split, by which a release is judged; it chooses nothing",
    }[side]
    if side == TRAIN:
        return use
    if spec.split_is_given:
        return f"{use}. As it was given: images of it may be in train too, see splits_share_no_image."
    return f"{use}. No image of it, nor a near-duplicate, is on another side."
