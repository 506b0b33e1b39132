"""What a run reads: the recipe's rows, encoded once, and the batches made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_assets.data.sharegpt import Row, load_rows
from mllm_assets.errors import DataError, RecipeError
from mllm_assets.training.collate import Collator
from mllm_assets.training.cutting import smallest_cutoff_len
from mllm_assets.training.encode import EncodedRow, Encoder, ImageCutError
from mllm_assets.training.families import processor_family, require_template
from mllm_assets.training.image_files import check_image_headers
from mllm_assets.training.mixing import mixed, split
from mllm_assets.training.model import load_processor
from mllm_assets.training.packing import pack
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
    if spec.packs:
        _check_packing(spec, processor, reporter)
    train_rows, eval_rows = (encode_rows(encoder, rows, spec) for rows in read_rows(spec, data_dir))
    _warn_of_cuts([*train_rows, *eval_rows], spec, reporter)
    inputs = Inputs(processor=processor, train_rows=pack_rows(train_rows, spec), eval_rows=pack_rows(eval_rows, spec))
    check_image_headers(inputs.images)
    return inputs


def _check_packing(spec: TrainSpec, processor: Any, reporter: "Reporter") -> None:
    family = processor_family(processor)
    if family.model_type != "gemma3":
        raise RecipeError(
            f"packing is only done for Gemma 3, and the model is {family.name}: its positions do not begin again in "
            f"the middle of a sequence. Delete packing and neat_packing."
        )
    if spec.neat_packing:
        reporter.warn("neat_packing: packed rows do not see each other. LLaMA-Factory 0.9.5 fails with it on Gemma 3.")
    else:
        reporter.warn(
            "packing: a row sees the rows packed in front of it, as in LLaMA-Factory. "
            "neat_packing: true keeps them apart."
        )


def _warn_of_cuts(rows: Sequence[EncodedRow], spec: TrainSpec, reporter: "Reporter") -> None:
    num_cut = sum(row.num_tokens_cut > 0 for row in rows)
    limit = f"cutoff_len {spec.cutoff_len}"
    if spec.packs:
        limit = f"the {spec.row_cutoff_len} tokens that {limit} leaves a row with packing"
    if num_cut:
        reporter.warn(f"{num_cut} of {len(rows)} rows are longer than {limit} and were cut.")


def read_rows(spec: TrainSpec, data_dir: Path) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and those to evaluate, mixed and held out as the recipe says.

    Raises:
        DataError, RecipeError: What must change.
    """

    def merged(entries: Sequence[str]) -> list[Row]:
        return mixed([load_rows(data_dir, entry, max_samples=spec.max_samples) for entry in entries], spec)

    train_rows, held_out = split(merged(spec.train_entries), spec)
    if spec.eval_strategy == "no":
        return train_rows, []
    return train_rows, merged(spec.eval_entries) if spec.eval_entries else held_out


def encode_rows(encoder: Encoder, rows: Sequence[Row], spec: TrainSpec) -> list[EncodedRow]:
    """Encode rows one by one.

    Raises:
        DataError: `cutoff_len` cuts into images (says of how many rows, and the least that works), or a row is wrong.
    """
    encoded, cut = [], []
    for row in rows:
        try:
            encoded.append(encoder.encode(row))
        except ImageCutError as error:
            cut.append(error)
    if cut:
        turns = [encoder.image_turns(row) for row in rows if row.images]
        least = smallest_cutoff_len(turns, encoder.cutoff_len, last_first=spec.mask_history)
        least += spec.cutoff_len - spec.row_cutoff_len
        raise DataError(
            f"cutoff_len {spec.cutoff_len} cuts into the images of {len(cut)} of {len(rows)} rows. The smallest that "
            f"works for all of them is {least}: set cutoff_len: {least}. The first one: {cut[0]}"
        )
    return encoded


def pack_rows(rows: list[EncodedRow], spec: TrainSpec) -> list[EncodedRow]:
    """Pack rows where the recipe says so."""
    if not spec.packs or not rows:
        return rows
    return pack(
        rows,
        spec.row_cutoff_len,
        group_size=spec.preprocessing_batch_size,
        num_groups=spec.preprocessing_num_workers,
    )


def make_encoder(spec: TrainSpec, processor: Any, model_dir: Path) -> Encoder:
    """Return the recipe's encoder.

    Raises:
        RecipeError: The recipe's template is of another family than the model.
    """
    require_template(spec.template, processor_family(processor), str(model_dir))
    return Encoder(
        processor,
        cutoff_len=spec.row_cutoff_len,
        train_on_prompt=spec.train_on_prompt,
        mask_history=spec.mask_history,
        template=spec.template,
        enable_thinking=spec.enable_thinking,
        preserve_thinking=spec.preserve_thinking,
        image_max_pixels=spec.image_max_pixels,
        image_min_pixels=spec.image_min_pixels,
    )


def make_collator(spec: TrainSpec, processor: Any, **cached: Any) -> Collator:
    """Return the recipe's collator, on pixels, or with `features` or `hidden_states` on what is cached."""
    return Collator(
        processor,
        image_max_pixels=spec.image_max_pixels,
        image_min_pixels=spec.image_min_pixels,
        separate_packed_rows=spec.neat_packing,
        **cached,
    )
