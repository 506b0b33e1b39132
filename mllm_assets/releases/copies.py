"""A release in another form, for another program: its task, its card, and what must be the same."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mllm_assets import __version__
from mllm_assets.artifacts import digest_json, read_manifest, write_text_atomic
from mllm_assets.data.sharegpt.dataset import Dataset, Entry
from mllm_assets.evaluation.agreement import Agreement
from mllm_assets.layout import Layout
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.releases.find import find_named_model
from mllm_assets.releases.versions import Release
from mllm_assets.worker.tasks import Manifest, Task

WEIGHTS = ("*.safetensors", "*.gguf")
FIGURES = {
    "agreement": "share of equal answers",
    "num_other_prompts": "rows with another prompt",
    "loss_nats": "loss of the release, nats",
    "loss_of_copy_nats": "loss of the copy, nats",
    "tokens_per_s": "tokens a second, release",
    "tokens_per_s_of_copy": "tokens a second, copy",
}
CARD = """\
---
library_name: {library}
pipeline_tag: image-text-to-text
tags: [mllm-assets, {recipe}]
---
# {recipe} {version}, {what}

Made from the release {version} of {recipe} (weights {weights}); its card says what it was trained on and what it
scores.
{how}

## Does it answer like the release?

{num_samples} rows of {entry}, asked greedily on {device}: {verdict}.

| | |
|---|---|
{rows}
| size of the weights, release | {size:.1f} MiB |
| size of the weights, copy | {copy_size:.1f} MiB |
"""


@dataclass(frozen=True, kw_only=True)
class CopyTask(Task[Manifest]):
    """Make a copy of a release and ask both the same.

    Attributes:
        entry_name: Whose rows are asked.
        turns: As the release was trained.
        directory: Where the copy goes.
    """

    recipe_name: str
    release_dir: Path
    entry_name: str
    data_dir: Path
    media_dir: Path | None
    turns: TurnSettings
    asked_for: Agreement
    directory: Path

    @property
    def rows(self) -> Entry:
        return Dataset(self.data_dir, media_dir=self.media_dir).entry(self.entry_name)


@dataclass(frozen=True, kw_only=True)
class QuantizeTask(CopyTask):
    """With the language model's linear layers in 8 bits."""

    entry = "mllm_assets.releases.quantized:quantize_task"


def copy_of(
    kind: type[CopyTask], layout: Layout, recipe_name: str, release: Release, entry_name: str, asked_for: Agreement
) -> CopyTask:
    """The task that makes a copy; its directory is named by the release, the rows and what is asked for.

    Raises:
        IntegrityError: A file of the release was changed.
        RecipeError: No such entry.
    """
    model = find_named_model(release.directory, layout)
    media_dir = layout.root / model.media_dir if model.media_dir else None
    rows = Dataset(layout.data, media_dir=media_dir).entry(entry_name).digest
    identity = [__version__, kind.__name__, release.digest, rows, asdict(model.turns), asdict(asked_for)]
    return kind(
        recipe_name=recipe_name,
        release_dir=release.directory,
        entry_name=entry_name,
        data_dir=layout.data,
        media_dir=media_dir,
        turns=model.turns,
        asked_for=asked_for,
        directory=layout.copies(recipe_name, digest_json(identity)[:16]),
    )


def write_card(staging: Path, task: CopyTask, facts: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    """The copy's README: what it is, how it is used (`texts`), and the figures of the comparison."""
    release = read_manifest(task.release_dir)
    rows = [f"| {label} | {facts[name]:.4g} |" for name, label in FIGURES.items() if name in facts]
    size = sum(path.stat().st_size for path in task.release_dir.glob("*.safetensors"))
    copied = sum(path.stat().st_size for kind in WEIGHTS for path in staging.glob(kind))
    text = CARD.format(
        recipe=task.recipe_name,
        version=release["version"],
        weights=release["weights_digest"][:16],
        entry=task.entry_name,
        num_samples=facts.get("num_samples", 0),
        rows="\n".join(rows),
        size=size / 2**20,
        copy_size=copied / 2**20,
        **texts,
    )
    write_text_atomic(staging / "README.md", text)
