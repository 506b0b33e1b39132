"""What the model will see of a recipe: `mllm-assets inspect`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mllm_assets.data.ingest.images import open_picture
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import OutOfMemoryError, RecipeError
from mllm_assets.layout import Layout
from mllm_assets.recipe.load import Recipe, with_config_files
from mllm_assets.training.caches.prepare import Setup, plan_caches
from mllm_assets.training.encoding.collate import Collator
from mllm_assets.training.encoding.image_files import load_image
from mllm_assets.training.encoding.inputs import check_reach, make_collator, read_inputs
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.encoding.video_files import clip_frames, clip_of
from mllm_assets.training.encoding.visual_tokens import image_token_id, video_token_id
from mllm_assets.training.loop import memory
from mllm_assets.training.loop.fitting import what_fits
from mllm_assets.training.loop.memory import MemoryEstimate
from mllm_assets.training.loop.reporting import trainable_lines
from mllm_assets.training.models import freezing
from mllm_assets.training.models.device import pick_device, pick_precision
from mllm_assets.training.models.load import load_config, model_on_meta, quiet_libraries
from mllm_assets.training.models.vocabulary import extended_shape
from mllm_assets.training.runs.models import find_adapters, find_model_dir
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import CacheSettings

SUPERVISED, SHADE, PLAIN = "\033[1;32m", "\033[2m", "\033[0m"


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """A recipe as a run would see it, before a weight is loaded."""

    setup: Setup
    needed: MemoryEstimate
    notes: Sequence[str]

    @property
    def memory(self) -> str:
        """What a step needs, of what there is."""
        device = self.setup.device
        free = f"{device.usable_gib:.1f} of {device.memory_gib:.1f} GiB free"
        return f"memory: {self.needed.describe()}, {free} on {device.name} ({device.kind})"

    def row(self, number: int) -> EncodedRow:
        """A training row, from 0; negative ones count from the end.

        Raises:
            RecipeError: There is no such row.
        """
        rows = self.setup.inputs.train_rows
        if not -len(rows) <= number < len(rows):
            raise RecipeError(
                f"--row {number}: the recipe has the training rows 0 to {len(rows) - 1}. Choose one of them."
            )
        return rows[number]

    def images(self, row: EncodedRow) -> Sequence[Image.Image]:
        """A row's images as the tower gets them, and behind them the frames of its videos."""
        processor = self.setup.inputs.processor
        collator = make_collator(self.setup.spec, processor)
        images = seen_images(row, collator, processor) if row.images else []
        return [*images, *(frame for path in row.videos for frame in seen_frames(path, row, collator))]


def look(recipe: Recipe, root: Path, *, device: str = "auto", max_rows: int | None = None) -> Look:
    """Read a recipe's rows, or the first `max_rows`, and its model's shape, and estimate a step's memory.

    Raises:
        MllmAssetsError: What a run would refuse.
    """
    quiet_libraries()
    recipe, reporter = with_config_files(recipe, root), Reporter()
    spec, seen_dir = recipe.spec, root / recipe.spec.output_dir / "inspect"
    model_dir = extended_shape(find_model_dir(recipe, root), spec, seen_dir / "model")
    if max_rows is not None:
        spec = replace(spec, max_samples=min(max_rows, spec.max_samples or max_rows))
    inputs = read_inputs(spec, model_dir, Dataset.of_recipe(spec, root), Layout(root).rows, reporter)
    found = pick_device(device, use_cpu=spec.use_cpu, warn=reporter.warn)
    precision = pick_precision(spec, found)
    on_meta = model_on_meta(load_config(model_dir), dtype=precision.weights, attention=precision.attention)
    adapters = find_adapters(recipe, root)
    shape = freezing.apply(spec, on_meta, adapters)
    check_reach(shape, inputs.train_rows, spec, reporter)
    setup = Setup(
        spec=spec, model_dir=model_dir, inputs=inputs, device=found, precision=precision, shape=shape,
        adapters=adapters,
        caches=CacheSettings(
            features_root=seen_dir, estimates_root=Layout(root).memory_estimates
        ),
    )  # fmt: skip
    plan = plan_caches(setup)
    setup = replace(setup, checkpointed=memory.needs_checkpointing(setup, plan))
    needed = memory.estimate(setup, plan)
    notes = [*recipe.notes, *reporter.warnings, *shape.warnings]
    try:
        memory.require_memory(needed, found, lambda: what_fits(setup))
    except OutOfMemoryError as error:
        notes.append(f"this run would be refused: {error}")
    return Look(setup=setup, needed=needed, notes=notes)


def inspect(recipe: Recipe, root: Path, *, row: int = 0, device: str = "auto", colour: bool = False) -> Iterator[str]:
    """Yield lines: one training row as tokens and images, what trains, the memory, the keys without effect.

    The images as the model sees them are written as PNG into `inspect` in the recipe's output folder. `row` counts in
    the recipe's order, packed rows if it packs. Supervised tokens are in `colour`, otherwise in double brackets.

    Raises:
        MllmAssetsError: What a run would refuse; or there is no such row.
    """
    seen = look(recipe, root, device=device)
    shown, num_rows, processor = seen.row(row), len(seen.setup.inputs.train_rows), seen.setup.inputs.processor
    yield f"row {row % num_rows} of {num_rows}: {shown.id}"
    yield row_facts(shown)
    image_dir = root / recipe.spec.output_dir / "inspect"
    collator = make_collator(recipe.spec, processor)
    yield from _image_lines(shown, collator, processor, image_dir)
    yield from _video_lines(shown, collator, image_dir)
    what = (
        "the reference, with which the model's own answers are compared,"
        if recipe.spec.learns_rewards
        else ("supervised tokens")
    )
    yield f"{what} in green:" if colour else f"{what} in [[double brackets]]:"
    yield token_text(shown, processor, colour=colour)
    if shown.mark is not None:
        yield f"the answer is marked as a {'good' if shown.mark else 'bad'} one"
    if shown.other is not None:
        what = "the rejected answer" if shown.mark is None else "another row's answer, to tell how far the model moves"
        yield f"{what}, {row_facts(shown.other)}:"
        yield token_text(shown.other, processor, colour=colour)
    yield ""
    yield from trainable_lines(seen.setup.shape.table, seen.setup.shape.num_params)
    yield ""
    yield seen.memory
    for note in seen.notes:
        yield f"note: {note}"


def row_facts(row: EncodedRow) -> str:
    """How much of a row there is."""
    cut = f", {row.num_tokens_cut} cut off" if row.num_tokens_cut else ""
    told = f"{len(row.input_ids)} tokens, {row.num_supervised} supervised{cut}, {len(row.images)} images"
    return f"{told}, {len(row.videos)} videos" if row.videos else told


def token_text(row: EncodedRow, processor: Any, *, colour: bool) -> str:
    """Return a row's tokens as text: the supervised ones marked, and each image's and video's tokens as one."""
    decode = processor.tokenizer.decode
    parts = []
    for visual, supervised, tokens in stretches(row, processor):
        is_image = visual is not None
        text = f"{decode([visual])} x {len(tokens)}" if is_image else decode(tokens).replace("\033", "\\033")
        if supervised:
            parts.append(f"{SUPERVISED}{text}{PLAIN}" if colour else f"[[{text}]]")
        else:
            parts.append(f"{SHADE}{text}{PLAIN}" if colour and is_image else text)
    return "".join(parts)


def stretches(row: EncodedRow, processor: Any) -> Iterator[tuple[int | None, bool, list[int]]]:
    """A row's tokens in stretches: which token it is that stands for pictures or videos, whether they are learnt."""
    visual = {image_token_id(processor), video_token_id(processor)}

    def kind(pair: tuple[int, int]) -> tuple[int | None, bool]:
        return pair[0] if pair[0] in visual else None, pair[1] >= 0

    for (token, is_learnt), group in groupby(zip(row.input_ids, row.labels, strict=True), key=kind):
        yield token, is_learnt, [token for token, _ in group]


def _video_lines(row: EncodedRow, collator: Collator, folder: Path) -> Iterator[str]:
    for number, path in enumerate(row.videos):
        folder.mkdir(parents=True, exist_ok=True)
        clip = clip_of(path, collator.videos, collator.slots, row_id=row.id)
        yield f"video {number}: {path.name}, {clip.num_frames} frames:"
        for seconds, frame in zip(clip.seconds, seen_frames(path, row, collator), strict=True):
            target = folder / f"{path.stem}-{number}-{seconds:.2f}s.png"
            frame.save(target)
            yield f"  {seconds:.2f} s {frame.width}x{frame.height} {target}"


def seen_frames(path: Path, row: EncodedRow, collator: Collator) -> Sequence[Image.Image]:
    """Return a video's frames that are shown, before they are cut into patches."""
    return clip_frames(path, collator.videos, collator.slots, row_id=row.id)


def _image_lines(row: EncodedRow, collator: Collator, processor: Any, folder: Path) -> Iterator[str]:
    for number, path in enumerate(row.images):
        folder.mkdir(parents=True, exist_ok=True)
        with open_picture(path) as original:
            source = f"{path.name} {original.width}x{original.height} {original.mode}"
        one = EncodedRow.of_picture(path, row.id)
        for tile, image in enumerate(seen_images(one, collator, processor)):
            target = folder / f"{path.stem}-{number}-{tile}.png"
            image.save(target)
            yield f"image {number}: {source} -> {image.width}x{image.height} {target}"


def seen_images(row: EncodedRow, collator: Collator, processor: Any) -> Sequence[Image.Image]:
    """Return a row's images as the tower gets them, before normalisation; several for an image in tiles."""
    pixels = collator.tower_inputs([replace(row, videos=())])["pixel_values"]
    if pixels.ndim < 4 or pixels.shape[-3] != 3:  # a list of patches: show the image before it was cut into them
        return [load_image(path, **collator.image_limits, row_id=row.id, slots=collator.slots) for path in row.images]
    values, how = pixels.reshape(-1, *pixels.shape[-3:]).float(), processor.image_processor
    if how.do_normalize:
        mean, std = (torch.tensor(of_channels).view(3, 1, 1) for of_channels in (how.image_mean, how.image_std))
        values = values * std + mean
    tiles = (values * 255).round().clamp(0, 255).byte()
    return [Image.fromarray(tile.permute(1, 2, 0).numpy()) for tile in tiles]
