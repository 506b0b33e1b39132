"""What a run reads: the recipe's rows, encoded once."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_assets.data.ingest.images import departure_text
from mllm_assets.data.sharegpt.dataset import Dataset, Entry
from mllm_assets.errors import DataError, RecipeError
from mllm_assets.families.family import processor_family, require_attention, require_template
from mllm_assets.families.turn_format import AUTO
from mllm_assets.file_digests import FileDigests
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.encoding.collate import Collator
from mllm_assets.training.encoding.encode import Encoder, ImageCutError
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.image_files import departures
from mllm_assets.training.encoding.marked import note_on_marks, with_others
from mllm_assets.training.encoding.packing import check_packing, pack
from mllm_assets.training.encoding.rendered import collator_of, encoder_of
from mllm_assets.training.encoding.row import IGNORE_INDEX
from mllm_assets.training.encoding.row_files import Source, rows_fingerprint, shown, stored_rows
from mllm_assets.training.encoding.turns import smallest_cutoff_len
from mllm_assets.training.encoding.visual_tokens import image_token_id
from mllm_assets.training.models.freezing import TrainableSet
from mllm_assets.training.models.load import load_config, load_processor

if TYPE_CHECKING:
    from datasets import Dataset as Table

    from mllm_assets.worker.protocol import Reporter

STOPPING = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}


@dataclass(kw_only=True, slots=True)
class Inputs:
    """What a run reads: the processor, the encoded rows, and the digests of its files.

    `eval_parts` are the evaluation's rows by entry where each has a loss of its own (`eval_on_each_dataset`).
    """

    processor: Any
    train_rows: EncodedRows
    eval_rows: EncodedRows
    digests: FileDigests
    eval_parts: dict[str, EncodedRows] = field(default_factory=dict)

    @property
    def rows(self) -> EncodedRows:
        """Every sequence that the model reads."""
        return self.train_rows.sequences + self.eval_rows.sequences


def read_inputs(spec: TrainSpec, model_dir: Path, dataset: Dataset, rows_root: Path, reporter: "Reporter") -> Inputs:
    """Encode all rows and open every image's header, so that bad data is named before the first step.

    Rows that are encoded below `rows_root` already are not encoded again.

    Raises:
        DataError, RecipeError, ModelError: What must change.
    """
    processor = load_processor(model_dir)
    encoder = make_encoder(spec, processor, model_dir)
    if spec.packs:
        check_packing(spec, processor, reporter)
    # an entry that only judges may hold answers where pairs are learnt
    names = dict.fromkeys((*spec.train_entries, *(spec.eval_entries if spec.eval_strategy != "no" else ())))
    for name in names:
        _require_kind(dataset.entry(name), spec)
    stored: dict[str, EncodedRows] = {}
    for name in names:
        stored[name] = encoded_entry(dataset.entry(name), encoder, spec, rows_root, reporter)
    parts = chosen_rows(spec, stored)
    warn_of_first_rows(spec, dataset, reporter)
    _warn_of_cuts(sum(parts[1:], parts[0]), spec, reporter)
    warn_of_labels(parts[0], spec, processor, reporter)
    if keys := spec.turns.crop_keys:
        _warn_of_crops(parts[0], keys[0], reporter)
    elif processor_family(processor).crop_key == "crop_to_patches":
        _warn_of_wholes(parts[0], reporter)
    if spec.learns_marks:
        note_on_marks(parts, reporter)
        place = (rows_root, dataset.folder)
        parts = [with_others(rows, encoder, spec, place, dataset.digests, reporter) for rows in parts]
    if spec.packs:
        if any(rows.counted("videos").any() for rows in parts):
            raise RecipeError("Rows with videos are not packed. Delete packing and neat_packing, or take them out.")
        how = {"group_size": spec.preprocessing_batch_size, "num_groups": spec.preprocessing_num_workers}
        parts = [pack(rows, spec.row_cutoff_len, **how) for rows in parts]
    train_rows, *evaluated = parts
    inputs = Inputs(
        processor=processor,
        train_rows=train_rows,
        eval_rows=sum(evaluated[1:], evaluated[0]),
        digests=dataset.digests,
        eval_parts=dict(zip(spec.eval_entries, evaluated, strict=True)) if spec.evaluates_each else {},
    )
    check_pictures(inputs.rows, reporter)
    return inputs


def check_reach(shape: TrainableSet, rows: EncodedRows, spec: TrainSpec, reporter: "Reporter") -> None:
    """Refuse to train what no row reaches: tower and projector see pictures only.

    Raises:
        RecipeError: They are all that trains, and no row has a picture.
    """
    visual = [
        name for name in shape.names if any(k in name for k in shape.family.vision_keys + shape.family.projector_keys)
    ]
    num_with = int(np.count_nonzero(rows.counted("images") + rows.counted("videos")))
    is_all = len(visual) == len(shape.names)
    if not visual or num_with == len(rows) or (num_with and not is_all):
        return
    parts = ", ".join(row["module"] for row in shape.table if any(row["module"] in name for name in visual))
    count = f"{num_with} of {len(rows)} rows of {spec.dataset} have a picture"
    if is_all and not num_with:
        raise RecipeError(
            f"Nothing would be learnt: only {parts} trains, which sees pictures alone, and {count}. Name a dataset "
            "with an `images` column, or train the language model: freeze_language_model: false."
        )
    if is_all and not shape.family.is_described:  # a batch without a picture would have no gradient at all
        raise RecipeError(
            f"Only {parts} trains, which sees pictures alone, and {count}. With template: {AUTO} each row needs one: "
            "take the others out, or train the language model: freeze_language_model: false."
        )
    reporter.warn(f"{count}: from the others {parts} learns nothing.")


def warn_of_first_rows(spec: TrainSpec, dataset: Dataset, reporter: "Reporter") -> None:
    """Say where `max_samples` leaves one answer of several: rows are in their source's order, often class by class."""
    num_samples = spec.max_samples or 0
    for name in spec.train_entries if num_samples > 1 else ():
        if num_samples <= dataset.entry(name).num_alike < dataset.entry(name).num_rows:
            reporter.warn(
                f"max_samples {num_samples}: the first {num_samples} rows of {name} all have the same answer, the "
                "others have not. Rows are in the order of their source: set it higher, or shuffle the source."
            )


def _warn_of_cuts(rows: EncodedRows, spec: TrainSpec, reporter: "Reporter") -> None:
    num_cut = int(np.count_nonzero(rows.counted("num_tokens_cut")))
    limit = f"cutoff_len {spec.cutoff_len}"
    if spec.packs:
        limit = f"the {spec.row_cutoff_len} tokens that {limit} leaves a row with packing"
    if num_cut:
        reporter.warn(f"{num_cut} of {len(rows)} rows are longer than {limit} and were cut.")


def _warn_of_wholes(rows: EncodedRows, reporter: "Reporter") -> None:
    if rows.counted("num_patches").any() and not rows.counted("num_crops").any():
        reporter.warn(
            "crop_to_patches is not set: pictures are shown whole, at the size of one patch. InternVL's processor in "
            "transformers shows patches of them too, unless it is told crop_to_patches=False. Set "
            "crop_to_patches: true to train so."
        )


def _warn_of_crops(rows: EncodedRows, key: str, reporter: "Reporter") -> None:
    crops = rows.counted("num_crops")
    num_crops, num_rows = int(crops.sum()), int(np.count_nonzero(crops))
    shown = f"{num_rows:,} of {len(rows):,} rows show {num_crops:,} parts of pictures beside the whole ones"
    if not num_crops:
        shown = "no picture is long and large enough to show parts of it"
    told = key.removeprefix("image_")
    reporter.warn(
        f"{key}: {shown}. Another program that asks the model has to do it too: {told}=True for transformers' "
        "processor, mm_processor_kwargs for vLLM."
    )


def warn_of_labels(rows: EncodedRows, spec: TrainSpec, processor: Any, reporter: "Reporter") -> None:
    """Say what is learnt, or seen, differently from what a reader of the recipe may expect."""
    if spec.train_on_prompt:
        labels = Counter(chain.from_iterable(row.labels for row in rows))
        num_images, num_bos = labels[image_token_id(processor)], labels[processor.tokenizer.bos_token_id]
        reporter.warn(
            f"train_on_prompt: {num_images:,} image tokens and {num_bos:,} <bos> are among the "
            f"{labels.total() - labels[IGNORE_INDEX]:,} labels, as in LLaMA-Factory: the whole question is learnt, "
            "not its words alone."
        )
    family = processor_family(processor)
    if family.token_types and family.token_types[1] == "answers" and not spec.train_on_prompt:
        num_several = int(np.count_nonzero(rows.counted("stretches") > 2))
        if num_several:
            reporter.warn(
                f"{num_several} of {len(rows)} rows have several answers. {family.name} is asked with all that is "
                "before an answer seen in both directions; here that is the first question alone, or an answer would "
                "be seen before it is learnt. mask_history: true learns the last answer only, as it is asked."
            )


def chosen_rows(spec: TrainSpec, entries: Mapping[str, EncodedRows]) -> list[EncodedRows]:
    """Return the rows to train on and to evaluate, mixed and held out as in the recipe, or those of each entry.

    Raises:
        DataError: One of the two would be empty.
    """

    def merged(names: Sequence[str]) -> EncodedRows:
        rows = [entries[name] for name in names]
        return sum(rows[1:], rows[0]).take(mixed([len(some) for some in rows], spec))

    rows = merged(spec.train_entries)
    trained, held_out = split(len(rows), spec)
    if spec.eval_strategy == "no":
        return [rows.take(trained), rows.take(())]
    if spec.evaluates_each:
        return [rows.take(trained), *(merged([name]) for name in spec.eval_entries)]
    return [rows.take(trained), merged(spec.eval_entries) if spec.eval_entries else rows.take(held_out)]


def _require_kind(entry: Entry, spec: TrainSpec) -> None:
    if spec.learns_marks and (entry.info.ranking or "kto_tag" not in entry.info.columns):
        raise RecipeError(
            f"stage is kto, which learns answers that are marked good or bad, and the entry {entry.name} has no marks: "
            "its `columns` do not name a `kto_tag`. Name an entry that has, or set stage: sft."
        )
    if entry.info.ranking == spec.learns_pairs:
        return
    if spec.learns_pairs:
        raise RecipeError(
            f"stage is {spec.stage}, which learns pairs of answers, and the entry {entry.name} has none: it does not "
            "set `ranking`. Name an entry of pairs, or set stage: sft."
        )
    raise RecipeError(
        f"The entry {entry.name} sets `ranking`: its rows are pairs of answers, which stage: {spec.stage} does not "
        "learn. Set stage: dpo or rm, or name an entry of answers."
    )


def encoded_entry(
    entry: Entry, encoder: Encoder, spec: TrainSpec, rows_root: Path, reporter: "Reporter"
) -> EncodedRows:
    """Return the rows of an entry, or the first `max_samples`, encoded now if they were not before.

    Raises:
        DataError: `cutoff_len` cuts into images (names the number of rows and the least that works), or a row is wrong.
    """
    count = min(entry.num_rows, spec.max_samples or entry.num_rows)
    digests = entry.dataset.digests
    files = None if encoder.sees_sizes else list(entry.file_digests)
    encode = encoder.encode_pair if spec.learns_pairs else encoder.encode
    if spec.learns_marks:
        encode = encoder.encode_marked
    source = Source(
        count=count,
        rows=lambda: islice(entry.unparsed(), count),
        encode=lambda row: encode(row()),
        require_unchanged=lambda: digests.require_unchanged(files),
        folder=entry.dataset.folder,
        image_token_id=encoder.image_token_id,
        in_pairs=spec.learns_pairs,
    )
    directory = rows_root / rows_fingerprint(encoder, [entry.identity, count, spec.stage])
    try:
        return stored_rows(directory, source, digests, reporter)
    except ImageCutError as error:
        raise _too_short(entry, encoder, count, spec, error) from error


def _too_short(entry: Entry, encoder: Encoder, count: int, spec: TrainSpec, first: ImageCutError) -> DataError:
    turns = [encoder.image_turns(row) for row in islice(entry.each(), count) if row.images or row.videos]
    num_cut = sum(not some.fits(encoder.cutoff_len, last_first=spec.mask_history) for some in turns)
    least = smallest_cutoff_len(turns, encoder.cutoff_len, last_first=spec.mask_history)
    least += spec.cutoff_len - spec.row_cutoff_len
    return DataError(
        f"cutoff_len {spec.cutoff_len} cuts into the images of {num_cut} of {count} rows. The smallest that works for "
        f"all of them is {least}: set cutoff_len: {least}. The first one: {first}"
    )


def make_encoder(spec: TrainSpec, processor: Any, model_dir: Path) -> Encoder:
    """Return the recipe's encoder.

    Raises:
        RecipeError: The recipe's template is of another family than the model, or its `flash_attn` cannot compute it.
    """
    family = processor_family(processor)
    require_template(spec.template, family, str(model_dir))
    require_attention(spec.flash_attn, family)
    if not family.is_described:
        _require_plain(spec)
    return encoder_of(processor)(
        processor,
        replace(spec.turns, cutoff_len=spec.row_cutoff_len),
        train_on_prompt=spec.train_on_prompt,
        mask_history=spec.mask_history,
        preserve_thinking=spec.preserve_thinking,
        num_embeddings=load_config(model_dir).get_text_config().vocab_size,
    )


def _require_plain(spec: TrainSpec) -> None:
    """Refuse what needs to know the model's family.

    Raises:
        RecipeError: Names the keys.
    """
    wanted = {
        "stage": spec.stage != "sft",
        "label_smoothing_factor": bool(spec.label_smoothing_factor),
        **dict.fromkeys(spec.turns.crop_keys, True),
        "add_tokens or resize_vocab": bool(spec.plain_tokens or spec.special_tokens or spec.resize_vocab),
    }
    if refused := [key for key, is_set in wanted.items() if is_set]:
        raise RecipeError(
            f"template: {AUTO} trains answers by the model's own chat template, processor and loss, without "
            f"{' and '.join(refused)}. Delete it, or name a model of another family."
        )


def make_collator(spec: TrainSpec, processor: Any, digests: FileDigests | None = None, **cached: Any) -> Collator:
    """Return the recipe's collator of pixels, or of cached `features` or `hidden_states`.

    With `digests` it refuses an image that changed since its digest was taken.
    """
    collator = collator_of(processor)(processor, spec.turns, separate_packed_rows=spec.neat_packing, **cached)
    collator.digests = digests
    return collator


def check_pictures(rows: EncodedRows, reporter: "Reporter") -> None:
    """Open every picture's header, and warn of how many the model sees differently than in LLaMA-Factory.

    Raises:
        DataError: A file is not a picture that can be used.
    """
    used = [*rows.pictures()]
    for why, num_pictures in departures(shown(used, len(used), "check pictures", reporter)).items():
        reporter.warn(departure_text(why, num_pictures))


def mixed(lengths: Sequence[int], spec: TrainSpec) -> Sequence[int]:
    """Return the order of the rows of all entries by `mix_strategy`, of which they are numbered one after another.

    With `interleave_over` a row may come twice.
    """
    if len(lengths) == 1 or spec.mix_strategy == "concat":
        return range(sum(lengths))
    from datasets import interleave_datasets

    first = [sum(lengths[:k]) for k in range(len(lengths))]
    numbered = [_numbers(range(start, start + length)) for start, length in zip(first, lengths, strict=True)]
    merged = interleave_datasets(
        numbered,
        probabilities=spec.probabilities,
        seed=spec.seed,
        stopping_strategy=STOPPING[spec.mix_strategy],  # pyright: ignore[reportArgumentType]
    )
    return list(merged["number"])


def split(num_rows: int, spec: TrainSpec) -> tuple[Sequence[int], Sequence[int]]:
    """Return the numbers of the rows to train on and of those that `val_size` holds out.

    Raises:
        DataError: One of the two would be empty.
    """
    if not spec.val_size:
        return range(num_rows), ()
    # Above 1 a number of rows, below a share of them: scikit-learn's rule, which `datasets` follows
    size = int(spec.val_size) if spec.val_size > 1 else spec.val_size
    try:
        parts = _numbers(range(num_rows)).train_test_split(test_size=size, seed=spec.seed)
    except ValueError:
        raise DataError(
            f"val_size is {spec.val_size}, and the recipe has {num_rows} rows: nothing would be left to train on or "
            f"to evaluate. Choose a share between 0 and 1, or a number of rows below {num_rows}."
        ) from None
    return list(parts["train"]["number"]), list(parts["test"]["number"])


def _numbers(values: range) -> "Table":
    from datasets import Dataset as Table

    return Table.from_dict({"number": list(values)})
