"""`<dataset>/train` and `<dataset>/val`, written together and checked before anything reads them."""

import dagster as dg

from mllm_assets.artifacts import digest_json
from mllm_assets.components.lineage import upstream_path
from mllm_assets.components.reporting import check_results, counts_table
from mllm_assets.components.resources import ProjectResource, failures_for_people
from mllm_assets.data.checks import counts_add_up, every_image_has_a_placeholder, splits_share_no_image
from mllm_assets.data.spec import DatasetSpec, as_json
from mllm_assets.data.splits import split

COUNTS = ("num_raw", "num_train", "num_val", "num_unused", "num_rejected", "num_augmented")


CHECKS = {
    "counts_add_up": "Every sample of the source trains, validates, is unused or is rejected, each with a reason.",
    "every_image_has_a_placeholder": "Each row has as many <image> placeholders as images, and its files are there.",
    "splits_share_no_image": "No image, nor a near-duplicate of it, is in both splits.",
}


def splits_asset(spec: DatasetSpec) -> dg.AssetsDefinition:
    raw_key, quality_key = dg.AssetKey([spec.name, "raw"]), dg.AssetKey([spec.name, "sample_quality"])
    train_key, val_key = dg.AssetKey([spec.name, "train"]), dg.AssetKey([spec.name, "val"])
    checks = {
        train_key: ("every_image_has_a_placeholder", "counts_add_up"),
        val_key: ("every_image_has_a_placeholder", "splits_share_no_image"),
    }

    def asset_spec(key: dg.AssetKey, description: str) -> dg.AssetSpec:
        return dg.AssetSpec(
            key,
            deps=[raw_key, quality_key],
            group_name="curate",
            kinds={"parquet" if spec.output.format == "parquet" else "json"},
            code_version=digest_json(as_json(spec))[:16],
            description=description,
        )

    @dg.multi_asset(
        name=f"{spec.name}__splits",
        specs=[
            asset_spec(train_key, "The training split as ShareGPT rows."),
            asset_spec(val_key, _val_description(spec)),
        ],
        check_specs=[
            dg.AssetCheckSpec(name, asset=key, blocking=True, description=CHECKS[name])
            for key, names in checks.items()
            for name in names
        ],
    )
    def splits(context: dg.AssetExecutionContext, project: ProjectResource):
        layout = project.layout
        with failures_for_people():
            raw = upstream_path(context, raw_key, project)
            quality = upstream_path(context, quality_key, project)
            if mirror := project.mirror(context):
                mirror.bring_history(spec.name)  # no sample changes sides because another machine splits
            result = split(spec, layout, raw, quality, context.run.run_id)
            placeholders = every_image_has_a_placeholder(result.directory, layout.data)
            outcomes = {
                train_key: {"every_image_has_a_placeholder": placeholders, "counts_add_up": counts_add_up(result)},
                val_key: {
                    "every_image_has_a_placeholder": placeholders,
                    "splits_share_no_image": splits_share_no_image(
                        result.directory, layout.data, store=project.quality_store
                    ),
                },
            }
        # a split that is given may hold duplicates on both sides: said here, and refused by the release
        warned = {"splits_share_no_image"} if spec.split_is_given else set()
        sizes = {train_key: (result.num_train, result.train_digest), val_key: (result.num_val, result.val_digest)}
        for key, (num_samples, digest) in sizes.items():
            yield project.recorded(
                context,
                dg.MaterializeResult(
                    asset_key=key,
                    data_version=dg.DataVersion(digest),
                    check_results=check_results(key, outcomes[key], only_warn=warned),
                    metadata={
                        "num_samples": num_samples,
                        **{name: getattr(result, name) for name in COUNTS},
                        "unused_reasons": counts_table(result.unused_reasons, "reason"),
                        "augmentations": counts_table(result.augmentations, "augmentation"),
                        "path": layout.relative(result.directory),
                    },
                ),
            )

    return splits


def _val_description(spec: DatasetSpec) -> str:
    if spec.split_is_given:
        return "The validation split as it was given: images of it may be in train too, see splits_share_no_image."
    return "The validation split: no image of it, nor a near-duplicate, is in train."
