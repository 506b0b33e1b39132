"""One dataset, from its source to its entries in `dataset_info.json`, as five assets declared by a `defs.yaml`."""

from typing import Literal

import dagster as dg
from pydantic import Field

from mllm_assets.artifacts import slug
from mllm_assets.components.automation_yaml import Watch
from mllm_assets.components.component_secrets import refused_for_secret
from mllm_assets.components.data_automation import automation_sensor, made_when_inputs_changed
from mllm_assets.components.dataset_info_asset import dataset_info_asset
from mllm_assets.components.dataset_yaml import Entries, Output, Quality, Source, Split
from mllm_assets.components.raw_asset import raw_asset
from mllm_assets.components.reporting import MAX_TAG_LENGTH, failing_asset
from mllm_assets.components.sample_quality_asset import sample_quality_asset
from mllm_assets.components.source_watch import source_sensors
from mllm_assets.components.splits_asset import splits_asset
from mllm_assets.data.spec import DatasetSpec, OutputSpec, QualitySpec, SourceSpec, SplitSpec
from mllm_assets.errors import MllmAssetsError
from mllm_assets.layout import Layout


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
        in_its_place = dg.AssetKey([slug(self.name), "dataset_info"])
        if refused := refused_for_secret(self, context, in_its_place, "curate"):
            return refused
        try:
            spec = self.spec()
        except MllmAssetsError as error:
            return dg.Definitions(assets=[failing_asset(in_its_place, "curate", error)])
        raw = raw_asset(spec, self.description, self.license)
        derived = [sample_quality_asset(spec), splits_asset(spec), dataset_info_asset(spec)]
        sensors = source_sensors(spec, self.watch.to_domain(), Layout.from_environment())
        if self.automatic:
            derived = [made_when_inputs_changed(asset) for asset in derived]
            sensors.append(automation_sensor(spec.name, derived))
        tags = {"dataset": spec.name[:MAX_TAG_LENGTH]}
        assets = [a.map_asset_specs(lambda asset: asset.merge_attributes(tags=tags)) for a in (raw, *derived)]
        return dg.Definitions(assets=assets, sensors=sensors)
