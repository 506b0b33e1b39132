"""What a run reads: the recipe's rows, encoded once, and the batches made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_assets.data.sharegpt import load_rows
from mllm_assets.training.collate import Collator
from mllm_assets.training.encode import EncodedRow, Encoder, check_image_headers
from mllm_assets.training.families import processor_family, require_template
from mllm_assets.training.model import load_processor
from mllm_assets.training.spec import TrainSpec

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter


@dataclass(kw_only=True, slots=True)
class Inputs:
    """What a run reads: the processor and the encoded rows."""

    processor: Any
    train_rows: list[EncodedRow]
    eval_rows: list[EncodedRow]

    @property
    def images(self) -> list[EncodedRow]:
        return [*self.train_rows, *self.eval_rows]


def read_inputs(spec: TrainSpec, model_dir: Path, data_dir: Path, reporter: "Reporter") -> Inputs:
    """Load and encode all rows and open every image's header, so that bad data is named before the first step.

    Raises:
        DataError, RecipeError, ModelError: What must change.
    """
    processor = load_processor(model_dir)
    encoder = make_encoder(spec, processor, model_dir)

    def rows(entries: Sequence[str]) -> list[EncodedRow]:
        loaded = [row for entry in entries for row in load_rows(data_dir, entry, max_samples=spec.max_samples)]
        return [encoder.encode(row) for row in loaded]

    evaluates = spec.eval_strategy != "no"
    inputs = Inputs(
        processor=processor,
        train_rows=rows(spec.train_entries),
        eval_rows=rows(spec.eval_entries) if evaluates else [],
    )
    num_cut = sum(row.num_tokens_cut > 0 for row in inputs.images)
    if num_cut:
        reporter.warn(
            f"{num_cut} of {len(inputs.images)} rows are longer than cutoff_len {spec.cutoff_len} and were cut."
        )
    check_image_headers(inputs.images)
    return inputs


def make_encoder(spec: TrainSpec, processor: Any, model_dir: Path) -> Encoder:
    """Return the recipe's encoder.

    Raises:
        RecipeError: The recipe's template is of another family than the model.
    """
    require_template(spec.template, processor_family(processor), str(model_dir))
    return Encoder(
        processor,
        cutoff_len=spec.cutoff_len,
        template=spec.template,
        enable_thinking=spec.enable_thinking,
        image_max_pixels=spec.image_max_pixels,
        image_min_pixels=spec.image_min_pixels,
    )


def make_collator(spec: TrainSpec, processor: Any, **cached: Any) -> Collator:
    """Return the recipe's collator, on pixels, or with `features` or `hidden_states` on what is cached."""
    return Collator(processor, image_max_pixels=spec.image_max_pixels, image_min_pixels=spec.image_min_pixels, **cached)
