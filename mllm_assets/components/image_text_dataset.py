"""One dataset, from its source to its entries in `dataset_info.json`, as assets declared by a `defs.yaml`."""

from typing import Any

import dagster as dg

from mllm_assets.artifacts import UNNAMED, slug
from mllm_assets.components.assets.corrections import corrections_asset
from mllm_assets.components.assets.dataset import dataset_info_asset, raw_asset, sample_quality_asset, splits_asset
from mllm_assets.components.automation.sources import Watch, automation_sensor, source_sensors, with_automation
from mllm_assets.components.jobs import LOGGERS, line_job
from mllm_assets.components.reporting import MAX_TAG_LENGTH, failing_asset, in_line
from mllm_assets.components.switches import off_asset, off_text, switched_on
from mllm_assets.components.yaml_checks import refuse_secrets
from mllm_assets.components.yaml_model import YamlModel, yaml_of
from mllm_assets.data.ingest.kinds import KINDS
from mllm_assets.data.ingest.spec import Augmentation, DatasetSpec, OutputSpec, QualitySpec, SourceSpec
from mllm_assets.data.ingest.split_spec import SIDES, SplitSpec
from mllm_assets.errors import MllmAssetsError, RecipeError, all_of
from mllm_assets.evaluation.label_issues import LabelIssuesSpec
from mllm_assets.layout import Layout


class Source(yaml_of(SourceSpec, kind=KINDS)):
    """Where the samples come from."""


class Split(yaml_of(SplitSpec)):
    """How many samples go where. Groups of near-duplicates stay together."""


class Output(yaml_of(OutputSpec)):
    """How the splits are written."""


class Quality(yaml_of(QualitySpec)):
    """Thresholds that reject or flag a sample, or make it a near-duplicate. Null keeps the default."""


class LabelIssues(yaml_of(LabelIssuesSpec)):
    """Makes <name>/label_issues, which ranks training rows by how suspicious their answers are."""


class Entries(YamlModel):
    """Names in `dataset_info.json`.

    Attributes:
        train: Of the training split; by default `<dataset>_train`.
        val: Of the validation split; by default `<dataset>_val`.
        test: Of the test split; by default `<dataset>_test`.
    """

    train: str = ""
    val: str = ""
    test: str = ""


class ImageTextDataset(dg.Component, YamlModel):
    """An image-text dataset as a ShareGPT directory that LLaMA-Factory reads.

    Makes `<name>/raw`, `/sample_quality`, `/corrections`, `/train`, `/val`, `/test` and `/dataset_info`.

    Attributes:
        name: Name of the dataset; its slug is the first part of the asset keys.
        description: What the dataset is.
        license: Its licence, for the model card; for example apache-2.0.
        source: Where the samples come from.
        prompts: Questions, used in turn by the sample's index within its split. Not for a source of conversations.
        answer: Template of the answer, with {caption} and {label}.
        system: System message of every sample that has none of its own.
        split: How many samples go where.
        augment: Adds to each training sample a changed copy per entry: mirrored (flip), cut to 80 to 100 % of each edge
            (crop), or with other brightness, contrast and saturation (color). May repeat. Rows whose words name what it
            changes get none: sides, places, writing, boxes, numbers of things, colours.
        augment_all_rows: Entries of augment that make copies of such rows too.
        quality: Thresholds that reject or flag a sample, or make it a near-duplicate.
        output: How the splits are written.
        entries: Names in `dataset_info.json`.
        label_issues: Makes <name>/label_issues, which ranks training rows by how suspicious their answers are.
        watch: The sensor that makes the dataset again when its source has something new.
        automatic: Whether quality, splits and entries are made again automatically when their inputs changed. The
            source itself is only read again by hand, by `watch`, or by a run that names it.
        enabled: Whether it may be made; false until it, or a recipe that needs it, is switched on.
    """

    name: str
    description: str = ""
    license: str = ""
    source: Source
    prompts: list[str] = []
    answer: str = "{caption}"
    system: str | None = None
    split: Split = Split()
    augment: list[Augmentation] = []
    augment_all_rows: list[Augmentation] = []
    quality: Quality = Quality()
    output: Output = Output()
    entries: Entries = Entries()
    label_issues: LabelIssues | None = None
    watch: Watch = Watch()
    automatic: bool = False
    enabled: bool = True

    def spec(self) -> DatasetSpec:
        """Return the domain's description of this dataset.

        Raises:
            RecipeError: A value is not valid. Says which, of each part.
        """
        parts: dict[str, Any] = {}
        problems: list[str] = []
        for name in ("source", "split", "quality", "output"):
            try:
                parts[name] = getattr(self, name).to_spec()
            except RecipeError as error:
                problems.append(str(error))
        if problems:
            raise RecipeError(all_of(problems))
        return DatasetSpec(
            name=slug(self.name),
            prompts=tuple(self.prompts),
            answer=self.answer,
            system=self.system,
            train_entry=self.entries.train,
            val_entry=self.entries.val,
            test_entry=self.entries.test,
            augment=tuple(self.augment),
            augment_all_rows=tuple(self.augment_all_rows),
            **parts,
        )

    def entry_names(self) -> list[str]:
        """The names of the splits' entries, even of a dataset that cannot be built."""
        return [getattr(self.entries, side) or f"{slug(self.name, UNNAMED)}_{side}" for side in SIDES]

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        fallback_key = dg.AssetKey([slug(self.name, UNNAMED), "dataset_info"])
        if refused := refuse_secrets(self, context, fallback_key):
            return refused
        try:
            spec = self.spec()
        except MllmAssetsError as error:
            return dg.Definitions(assets=[failing_asset(fallback_key, error)])
        raw = raw_asset(spec, self.description, self.license)
        derived = [sample_quality_asset(spec), corrections_asset(spec), splits_asset(spec), dataset_info_asset(spec)]
        sensors = source_sensors(spec, self.watch, Layout.from_environment())
        if self.automatic:
            derived = [with_automation(asset) for asset in derived]
            sensors.append(automation_sensor(spec.name, derived))
        tags = {"dataset": spec.name[:MAX_TAG_LENGTH]}
        assets = [
            a.map_asset_specs(lambda spec: in_line(spec.merge_attributes(tags=tags), tags["dataset"]))
            for a in (raw, *derived)
        ]
        if not self.enabled and not switched_on(context) & set(self.entry_names()):
            source = f"fetches {spec.source.repo} of the Hub" if spec.source.is_of_hub else "is not enabled"
            assets = [off_asset(asset, off_text(spec.name, source)) for asset in assets]
        job = line_job(fallback_key, f"{spec.name}: from its source to its entries in dataset_info.json.", set())
        return dg.Definitions(assets=assets, sensors=sensors, jobs=[job], loggers=LOGGERS)
