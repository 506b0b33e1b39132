"""One dataset, from its source to its entries in `dataset_info.json`, as five assets declared by a `defs.yaml`."""

from typing import Literal

import dagster as dg
from pydantic import Field

from mllm_assets.artifacts import digest_json, slug
from mllm_assets.components.automation_yaml import Watch
from mllm_assets.components.data_automation import automation_sensor, made_when_inputs_changed
from mllm_assets.components.dataset_yaml import Entries, Output, Quality, Source, Split
from mllm_assets.components.lineage import upstream_path
from mllm_assets.components.reporting import MAX_TAG_LENGTH, check_results, counts_table, failing_asset
from mllm_assets.components.resources import ProjectResource, failures_for_people
from mllm_assets.components.source_watch import LISTING, source_sensors
from mllm_assets.data.checks import counts_add_up, every_image_has_a_placeholder, splits_share_no_image
from mllm_assets.data.dataset_info import register
from mllm_assets.data.listing import is_watchable, list_source
from mllm_assets.data.sources import ingest
from mllm_assets.data.spec import DatasetSpec, OutputSpec, QualitySpec, SourceSpec, SplitSpec, as_json
from mllm_assets.data.splits import split
from mllm_assets.errors import MllmAssetsError
from mllm_assets.layout import Layout
from mllm_assets.quality.assess import assess
from mllm_assets.quality.report import write_report

COUNTS = ("num_raw", "num_train", "num_val", "num_unused", "num_rejected", "num_augmented")


class ImageTextDataset(dg.Component, dg.Model, dg.Resolvable):
    """An image-text dataset as a ShareGPT directory that LLaMA-Factory reads.

    Makes `<name>/raw`, `/sample_quality`, `/train`, `/val` and `/dataset_info`.
    """

    name: str = Field(description="Name of the dataset; its slug is the first part of the asset keys.")
    description: str = Field(default="", description="What the dataset is.")
    license: str = Field(default="", description="Its licence, for the model card; for example apache-2.0.")
    source: Source
    prompts: list[str] = Field(
        default=[],
        description="Questions, used in turn by the sample's index within its split. Not where the source holds "
        "conversations.",
    )
    answer: str = Field(default="{caption}", description="Template of the answer, with {caption} and {label}.")
    system: str | None = Field(default=None, description="System message of every sample that has none of its own.")
    split: Split = Split()
    augment: list[Literal["flip", "crop", "color"]] = Field(
        default=[],
        description="Adds to each training sample a changed copy per entry: mirrored (not where texts say left or "
        "right), cut to 80 to 100 % of each edge, or with other brightness, contrast and saturation. May repeat.",
    )
    quality: Quality = Quality()
    output: Output = Output()
    entries: Entries = Entries()
    watch: Watch = Watch()
    automatic: bool = Field(
        default=False,
        description="Whether quality, splits and entries are made again by themselves when what is above them changed. "
        "The source itself is only read again by hand, by `watch`, or by a run that names it.",
    )

    def spec(self) -> DatasetSpec:
        """Return the domain's description of this dataset.

        Raises:
            RecipeError: A value cannot stand. Says which.
        """
        return DatasetSpec(
            name=slug(self.name),
            source=SourceSpec(**self.source.model_dump()),
            prompts=tuple(self.prompts),
            answer=self.answer,
            system=self.system,
            train_entry=self.entries.train,
            val_entry=self.entries.val,
            split=SplitSpec(**self.split.model_dump()),
            quality=QualitySpec(**self.quality.model_dump(exclude_none=True)),
            output=OutputSpec(**self.output.model_dump()),
            augment=tuple(self.augment),
        )

    def entry_names(self) -> tuple[str, str]:
        """The names of the training and the validation entry, also of a dataset that cannot be read."""
        return self.entries.train or f"{slug(self.name)}_train", self.entries.val or f"{slug(self.name)}_val"

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        try:
            spec = self.spec()
        except MllmAssetsError as error:
            return dg.Definitions(
                assets=[failing_asset(dg.AssetKey([slug(self.name), "dataset_info"]), "curate", error)]
            )
        raw = _raw_asset(spec, self.description, self.license)
        derived = [_sample_quality_asset(spec), _splits_asset(spec), _dataset_info_asset(spec)]
        sensors = source_sensors(spec, self.watch.to_domain(), Layout.from_environment())
        if self.automatic:
            derived = [made_when_inputs_changed(asset) for asset in derived]
            sensors.append(automation_sensor(spec.name, derived))
        tags = {"dataset": spec.name[:MAX_TAG_LENGTH]}
        assets = [a.map_asset_specs(lambda asset: asset.merge_attributes(tags=tags)) for a in (raw, *derived)]
        return dg.Definitions(assets=assets, sensors=sensors)


def raw_code_version(spec: DatasetSpec) -> str:
    """What decides which rows are ingested: of a Hub dataset only as many are fetched as the splits ask for."""
    sampled = as_json(spec.split) if spec.source.kind == "huggingface" else None
    return digest_json([as_json(spec.source), sampled])[:16]


def _raw_asset(spec: DatasetSpec, description: str, license: str) -> dg.AssetsDefinition:
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


def _sample_quality_asset(spec: DatasetSpec) -> dg.AssetsDefinition:
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


def _splits_asset(spec: DatasetSpec) -> dg.AssetsDefinition:
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
            dg.AssetCheckSpec(name, asset=key, blocking=True) for key, names in checks.items() for name in names
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


def _dataset_info_asset(spec: DatasetSpec) -> dg.AssetsDefinition:
    train_key, val_key = dg.AssetKey([spec.name, "train"]), dg.AssetKey([spec.name, "val"])

    @dg.asset(
        key=[spec.name, "dataset_info"],
        group_name="curate",
        kinds={"json"},
        deps=[train_key, val_key],
        description=f"The entries {spec.train_entry} and {spec.val_entry} of data/dataset_info.json.",
    )
    def dataset_info(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        with failures_for_people():
            version = upstream_path(context, train_key, project)
            result = register(spec, project.layout, version)
        return project.recorded(
            context,
            dg.MaterializeResult(
                data_version=dg.DataVersion(result.digest),
                metadata={
                    "entries": dg.MetadataValue.json(result.entries),
                    "path": project.layout.relative(project.layout.dataset_info),
                },
            ),
        )

    return dataset_info
