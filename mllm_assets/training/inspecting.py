"""What the model will see of a recipe: `mllm-assets inspect`."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from mllm_assets.errors import RecipeError
from mllm_assets.training import caching, freezing
from mllm_assets.training.cache_plan import plan_caches
from mllm_assets.training.cache_settings import CacheSettings
from mllm_assets.training.collate import Collator
from mllm_assets.training.describing import trainable_lines
from mllm_assets.training.device import pick_device, pick_precision
from mllm_assets.training.encode import EncodedRow, image_token_id
from mllm_assets.training.image_files import load_image
from mllm_assets.training.inputs import make_collator, read_inputs
from mllm_assets.training.model import load_config, model_on_meta, quiet_libraries
from mllm_assets.training.recipe import Recipe

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter

SUPERVISED, SHADE, PLAIN = "\033[1;32m", "\033[2m", "\033[0m"


def inspect(
    recipe: Recipe,
    model_dir: Path,
    data_dir: Path,
    image_dir: Path,
    reporter: "Reporter",
    *,
    row: int = 0,
    device: str = "auto",
    colour: bool = False,
) -> Iterator[str]:
    """Yield lines: one training row as tokens and images, what trains, the memory, the keys without effect.

    Args:
        recipe: What would be trained.
        model_dir: The model it starts from.
        data_dir: The folder of `dataset_info.json`.
        image_dir: Where the images as the model sees them are written, as PNG.
        reporter: Told what a run would be told.
        row: Which training row, in the recipe's order, packed where it packs.
        device: What would train.
        colour: Supervised tokens in colour; otherwise in double brackets.

    Raises:
        MllmAssetsError: What a run would refuse; or there is no such row.
    """
    quiet_libraries()
    spec = recipe.spec
    inputs = read_inputs(spec, model_dir, data_dir, reporter)
    rows = inputs.train_rows
    if not -len(rows) <= row < len(rows):
        raise RecipeError(f"--row {row}: the recipe has the training rows 0 to {len(rows) - 1}. Choose one of them.")
    shown = rows[row]
    num_supervised = sum(label >= 0 for label in shown.labels)
    cut = f", {shown.num_tokens_cut} cut off" if shown.num_tokens_cut else ""
    yield f"row {row % len(rows)} of {len(rows)}: {shown.id}"
    yield f"{len(shown.input_ids)} tokens, {num_supervised} supervised{cut}, {len(shown.images)} images"
    yield from _image_lines(shown, make_collator(spec, inputs.processor), inputs.processor, image_dir)
    yield "supervised tokens in green:" if colour else "supervised tokens in [[double brackets]]:"
    yield token_text(shown, inputs.processor, colour=colour)
    yield ""
    found = pick_device(device, use_cpu=spec.use_cpu)
    precision = pick_precision(spec, found)
    shape = freezing.apply(spec, model_on_meta(load_config(model_dir), dtype=precision.weights))
    yield from trainable_lines(shape.table, shape.num_params)
    yield ""
    plan = plan_caches(shape, spec, CacheSettings(features_root=image_dir), inputs, precision)
    needed = caching.estimate_memory(shape, spec, found, precision, inputs, plan)
    yield f"memory: {needed.describe()} of {found.memory_gib:.1f} GiB on {found.name} ({found.kind})"
    for note in [*recipe.notes, *reporter.warnings, *shape.warnings]:
        yield f"note: {note}"


def token_text(row: EncodedRow, processor: Any, *, colour: bool) -> str:
    """Return a row's tokens as text, what is supervised marked, and each image's tokens as one."""
    image_token = image_token_id(processor)
    decode = processor.tokenizer.decode

    def kind(pair: tuple[int, int]) -> tuple[bool, bool]:
        return pair[0] == image_token, pair[1] >= 0

    parts = []
    for (is_image, supervised), group in groupby(zip(row.input_ids, row.labels, strict=True), key=kind):
        tokens = [token for token, _ in group]
        text = f"{decode([image_token])} x {len(tokens)}" if is_image else decode(tokens).replace("\033", "\\033")
        if supervised:
            parts.append(f"{SUPERVISED}{text}{PLAIN}" if colour else f"[[{text}]]")
        else:
            parts.append(f"{SHADE}{text}{PLAIN}" if colour and is_image else text)
    return "".join(parts)


def _image_lines(row: EncodedRow, collator: Collator, processor: Any, folder: Path) -> Iterator[str]:
    if not row.images:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(row.images):
        with Image.open(path) as original:
            source = f"{path.name} {original.width}x{original.height} {original.mode}"
        one = EncodedRow(id=row.id, input_ids=(), labels=(), images=(path,))
        for tile, image in enumerate(seen_images(one, collator, processor)):
            target = folder / f"{path.stem}-{number}-{tile}.png"
            image.save(target)
            yield f"image {number}: {source} -> {image.width}x{image.height} {target}"


def seen_images(row: EncodedRow, collator: Collator, processor: Any) -> Sequence[Image.Image]:
    """Return a row's images as the tower gets them, normalisation taken back; several where it gets tiles."""
    pixels = collator.tower_inputs([row])["pixel_values"]
    if pixels.ndim < 4 or pixels.shape[-3] != 3:  # patches in a line: the image before it was cut into them
        return [load_image(path, max_pixels=collator.image_max_pixels, min_pixels=collator.image_min_pixels,
                           row_id=row.id, slots=collator.slots) for path in row.images]  # fmt: skip
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in _mean_and_std(processor.image_processor))
    whole = ((pixels.reshape(-1, *pixels.shape[-3:]).float() * std + mean) * 255).round().clamp(0, 255).byte()
    return [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in whole]


def _mean_and_std(image_processor: Any) -> tuple[Sequence[float], Sequence[float]]:
    if not image_processor.do_normalize:
        return (0.0,) * 3, (1.0,) * 3
    return image_processor.image_mean, image_processor.image_std
