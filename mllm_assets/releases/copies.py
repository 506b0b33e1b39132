"""A release in another form, for another program: its task, its card, and what must be the same."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from mllm_assets import __version__
from mllm_assets.artifacts import digest_json, read_manifest, sha256_file, write_manifest, write_text_atomic
from mllm_assets.data.sharegpt.dataset import Dataset, Entry
from mllm_assets.errors import MachineError
from mllm_assets.evaluation.agreement import Agreement, Comparison
from mllm_assets.layout import Layout
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.releases.find import find_named_model
from mllm_assets.releases.versions import Release
from mllm_assets.worker.tasks import Manifest, Task

LLAMA_CPP, CONVERTER = "LLAMA_CPP", "convert_hf_to_gguf.py"
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

{verdict}

| | |
|---|---|
{rows}| size of the weights, release | {size:.1f} MiB |
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


@dataclass(frozen=True, kw_only=True, slots=True)
class CopySpec(Agreement):
    """What a copy is, and how alike it must answer."""

    @property
    def agreement(self) -> Agreement:
        return Agreement(**{field.name: getattr(self, field.name) for field in fields(Agreement)})


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedSpec(CopySpec):
    """How the release gets 8-bit weights.

    Attributes:
        weights: int8, or fp8 (E4M3), which cards since Ada Lovelace multiply in; fp8 was tried on the CPU alone.
        max_samples: Rows that both are asked about.
        max_new_tokens: Most tokens of an answer.
        min_agreement: The share of answers that must be the same.
        max_loss_distance_nats: How far the mean losses may be apart.
    """

    weights: Literal["int8", "fp8"] = "int8"


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufSpec(CopySpec):
    """How the release becomes GGUF.

    Attributes:
        llama_cpp: A checkout of llama.cpp, whose converter is run; by default that which LLAMA_CPP names.
        outtype: The precision of the weights, as the converter calls it; auto is 16 bits.
        max_samples: Rows of the recipe's first evaluation entry, spread evenly over it, that model and copy are asked.
        max_new_tokens: Tokens after which an answer is cut.
        min_agreement: The share of rows with the same answer, the likeliest token taken at each place.
        max_loss_distance_nats: Without effect: llama.cpp gives no losses.
    """

    llama_cpp: str | None = None
    outtype: Literal["auto", "f32", "f16", "bf16", "q8_0"] = "auto"

    def converter(self, root: Path) -> Path:
        """The converter's file.

        Raises:
            MachineError: There is no checkout. Says how to get one.
        """
        named = self.llama_cpp or os.environ.get(LLAMA_CPP)
        path = root / named / CONVERTER if named else None
        if path is None or not path.is_file():
            why = f"{root / named} has no {CONVERTER}" if named else f"neither {LLAMA_CPP} nor gguf.llama_cpp names one"
            raise MachineError(
                f"GGUF is made by llama.cpp's own converter, and {why}. Get it: git clone --depth 1 "
                f"https://github.com/ggml-org/llama.cpp && export {LLAMA_CPP}=$PWD/llama.cpp"
            )
        return path


@dataclass(frozen=True, kw_only=True)
class GgufTask(CopyTask):
    """For llama.cpp and what is built on it.

    Attributes:
        converter: The file to run.
        outtype: As `GgufSpec` has it.
    """

    entry = "mllm_assets.releases.gguf:gguf_task"
    converter: Path
    outtype: str


@dataclass(frozen=True, kw_only=True)
class QuantizeTask(CopyTask):
    """With the language model's linear layers in 8 bits.

    Attributes:
        weights: As `QuantizedSpec` has it.
    """

    entry = "mllm_assets.releases.quantized:quantize_task"
    weights: Literal["int8", "fp8"] = "int8"


def copy_of(
    kind: type[CopyTask], layout: Layout, release: Release, entry_name: str, asked_for: Agreement, **how: Any
) -> CopyTask:
    """The task that makes a copy; its directory is named by the release, the rows, what is asked for and `how`.

    Raises:
        IntegrityError: A file of the release was changed.
        RecipeError: No such entry.
    """
    model = find_named_model(release.directory, layout)
    media_dir = layout.root / model.media_dir if model.media_dir else None
    rows = Dataset(layout.data, media_dir=media_dir).entry(entry_name).digest
    recipe_name = release.directory.parent.name
    made_by = {name: sha256_file(value) if isinstance(value, Path) else value for name, value in how.items()}
    asked = [rows, asdict(model.turns), asdict(asked_for)]
    identity = [__version__, kind.__name__, release.digest, *asked, made_by]
    return kind(
        recipe_name=recipe_name,
        release_dir=release.directory,
        entry_name=entry_name,
        data_dir=layout.data,
        media_dir=media_dir,
        turns=model.turns,
        asked_for=asked_for,
        directory=layout.copies(recipe_name, digest_json(identity)[:16]),
        **how,
    )


def write_copy(
    staging: Path, task: CopyTask, found: Comparison | None, facts: Mapping[str, Any], texts: Mapping[str, str]
) -> Manifest:
    """Write a copy's card and manifest, with the figures of the comparison where there was one.

    `facts` go into the manifest; `texts` say what the copy is and how it is used.
    """
    release = read_manifest(task.release_dir)
    sizes = {"num_bytes": _size_bytes(staging), "num_bytes_of_release": _size_bytes(task.release_dir)}
    figures = found.facts() if found else {}
    if found:
        alike = "it does" if found.passed else "IT DOES NOT"
        verdict = f"{len(found.rows)} rows of {task.entry_name}, asked greedily on {texts['device']}: {alike}."
    else:
        verdict = f"NOT COMPARED: {facts['not_compared']}"
    text = CARD.format(
        recipe=task.recipe_name,
        version=release["version"],
        weights=release["weights_digest"][:16],
        verdict=verdict,
        rows="".join(f"| {label} | {figures[name]:.4g} |\n" for name, label in FIGURES.items() if name in figures),
        size=sizes["num_bytes_of_release"] / 2**20,
        copy_size=sizes["num_bytes"] / 2**20,
        **texts,
    )
    write_text_atomic(staging / "README.md", text)
    made_of = {key: release[key] for key in ("version", "weights_digest")}
    compared = found.to_dict() if found else None
    made = {"recipe": task.recipe_name, **made_of, "entry": task.entry_name, **sizes, **facts, "comparison": compared}
    return write_manifest(staging, made)


def _size_bytes(directory: Path) -> int:
    """What a directory's weights take on disk."""
    return sum(path.stat().st_size for kind in WEIGHTS for path in directory.glob(kind))
