"""The frozen vision tower's output, computed once per image and shared by every recipe with the same tower.

A feature is named by the image's bytes, in a folder named by all else that it depends on. See docs/feature-cache.md.

Shape suffixes: K tokens of one image, R tokens of several, W values kept of a token.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mllm_assets.artifacts import digest_json
from mllm_assets.data.ingest.videos import decoder_name
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import IntegrityError, RecipeError
from mllm_assets.file_digests import FileDigests
from mllm_assets.training.caches import tower
from mllm_assets.training.caches.shards import ImageStore, probes
from mllm_assets.training.encoding.collate import Collator
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.loader import loaded
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.models.device import Precision, out_of_memory_is_an_error, pick_device, pick_precision
from mllm_assets.worker.tasks import WHOLE, Features, FeaturesTask, Part

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

CURE = "End other programs on the device: only the tower and a few images are on it."
NUM_IMAGES_PER_PASS = {"cpu": 4, "cuda": 32, "mps": 8}


class FeatureStore(ImageStore):
    """Features of images, a row for each token, by the digest of the image file."""

    kind = "vision_features"

    def batch(self, paths: Sequence[Path]) -> torch.Tensor:
        """Return rows_RW of all images, one after another.

        Raises:
            IntegrityError: An image's features are not in the store. Names the file.
        """
        return torch.cat([self.get(self.name(path)) for path in paths])

    def video_batch(self, paths: Sequence[Path]) -> torch.Tensor:
        """Return rows_RW of all videos, one after another; raises as `batch`."""
        return torch.cat([self.get(self.name(path, is_video=True)) for path in paths])

    def blank(self, num_tokens: int) -> torch.Tensor:
        """Return rows_KW of zeros for one image of `num_tokens` tokens, for a batch without images."""
        some_KW = self.any()
        return some_KW.new_zeros(num_tokens, some_KW.shape[1])

    def name(self, path: Path, *, is_video: bool = False) -> str:
        """Return the name of an image or video whose features are in the store.

        Raises:
            IntegrityError: They are not. Names the file.
        """
        name = video_name(self.digest(path)) if is_video else self.digest(path)
        if name not in self:
            kind = "video" if is_video else "image"
            raise IntegrityError(
                f"The {kind} {path} has no cached vision features in {self.directory}: the data changed after they "
                f"were made. Materialise vision_features again."
            )
        return name

    def compute(
        self,
        maker: "FeatureMaker",
        images: Mapping[str, EncodedRow],
        reporter: "Reporter",
        *,
        part: Part = WHOLE,
        wait: bool = True,
    ) -> int:
        """Compute the missing features of `images_by_digest`, as `fill` does, and return how many.

        Raises:
            DataError: An image is damaged. Names row and file.
        """
        size = NUM_IMAGES_PER_PASS[tower.device_of(maker.model).type]

        def make(passes: Sequence[Sequence[str]]) -> Iterator[list[torch.Tensor]]:
            return maker.make([[images[name] for name in some] for some in passes])

        videos = sorted(name for name, row in images.items() if row.videos)
        pictures = sorted(images.keys() - set(videos))
        # a video is a pass of its own: its frames are as many as a pass has pictures, or more
        num_videos = self.fill(videos, 1, make, reporter, part=part, wait=wait) if videos else 0
        return num_videos + self.fill(pictures, size, make, reporter, part=part, wait=wait)

    def require_match(self, maker: "FeatureMaker", rows: EncodedRows) -> None:
        """Compare the shards that will be read with their digests, and some features with the tower's own output.

        Raises:
            IntegrityError: An image is missing, a file is damaged, or a value differs.
        """
        self.require_undamaged(self.name(path) for path, _ in rows.pictures())
        self.require_undamaged(self.name(path, is_video=True) for row in rows.videos() for path in row.videos)
        for row in rows.take(probes(np.flatnonzero(rows.counted("images")).tolist())):
            pixels = maker.collator.tower_inputs([replace(row, videos=())])
            fresh = torch.cat(tower.image_rows(maker.model, pixels, maker.precision)).cpu()
            self.require_same(row.id, self.batch(row.images), fresh, "the tower's output", maker.precision)
        for row in probes([*rows.videos()]):
            fresh = torch.cat(tower.image_rows(maker.model, maker.collator.tower_inputs([row]), maker.precision)).cpu()
            self.require_same(row.id, self.video_batch(row.videos), fresh, "the tower's output", maker.precision)


def video_name(digest: str) -> str:
    """The name of a video's features: what decodes it may round its colours otherwise in another version."""
    return digest_json([digest, decoder_name()])


def visuals_by_name(rows: EncodedRows, digests: FileDigests) -> dict[str, EncodedRow]:
    """Return each different image and video of rows once, as `images_by_digest`."""
    videos = {video_name(digests.of(row.videos[0])): row for row in rows.videos()}
    return images_by_digest(rows.pictures(), digests) | videos


def images_by_digest(pictures: Iterable[tuple[Path, str]], digests: FileDigests) -> dict[str, EncodedRow]:
    """Return each different image once, by the digest of its bytes, as a row with the id of a row that has it."""
    found: dict[str, EncodedRow] = {}
    seen: set[Path] = set()
    for path, row_id in pictures:
        if path not in seen:
            seen.add(path)
            found.setdefault(digests.of(path), EncodedRow.of_picture(path, row_id))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureMaker:
    """The tower at work: `model` is in `eval` mode on the device that computes, in the training step's `precision`.

    `collator` makes pixels of a row's images, in `num_workers` processes.
    """

    model: Any
    collator: Collator
    precision: Precision
    num_workers: int = 0

    def make(self, passes: Sequence[Sequence[EncodedRow]]) -> Iterator[list[torch.Tensor]]:
        """Yield the features of the images of each pass."""
        dtype = self.precision.weights if tower.cut_of(self.model).rounds_pixels_first else torch.float32
        pixels = loaded(
            range(len(passes)),
            _Pixels(self.collator, passes, dtype),
            num_workers=self.num_workers,
            collators=[self.collator],
            pin_memory=tower.device_of(self.model).type == "cuda",
        )
        for _, inputs in pixels:
            yield [rows_KW.cpu().clone() for rows_KW in tower.image_rows(self.model, inputs, self.precision)]


@dataclass(frozen=True, slots=True)
class _Pixels:
    """The tower's inputs of a pass; in bf16 half as much goes from process to process."""

    collator: Collator
    passes: Sequence[Sequence[EncodedRow]]
    dtype: torch.dtype

    def __call__(self, number: int) -> dict[str, torch.Tensor]:
        inputs = self.collator.tower_inputs(self.passes[number])
        return inputs | {"pixel_values": inputs["pixel_values"].to(self.dtype)}


def _videos_of(task: FeaturesTask, processor: Any, dataset: Dataset) -> dict[str, EncodedRow]:
    """Each different video of a task's rows once, by the name of its features."""
    from mllm_assets.training.encoding.inputs import make_encoder

    spec, found = task.recipe, {}
    encoder = make_encoder(spec, processor, task.model_dir)
    for entry in map(dataset.entry, (*spec.train_entries, *spec.eval_entries)):
        for row in islice(entry.each(), spec.max_samples) if entry.videos else ():
            for path, slot in zip(row.videos, encoder.media(row).videos, strict=True):
                name = video_name(dataset.digests.of(path))
                found.setdefault(name, EncodedRow.of_video(path, row.id, slot.grid_thw))
    return found


def features_task(task: FeaturesTask, reporter: "Reporter") -> Features:
    """Worker entry: compute what is missing of a recipe's vision features.

    Raises:
        RecipeError: The recipe trains the tower.
        IntegrityError: An image changed after its dataset was published, or a weight file meanwhile.
    """
    from mllm_assets.training.encoding.inputs import make_collator
    from mllm_assets.training.models.load import load_model, load_processor, quiet_libraries
    from mllm_assets.training.models.quantization import quantizing_device

    quiet_libraries()
    spec = task.recipe
    if not spec.freeze_vision_tower:
        raise RecipeError("freeze_vision_tower is false, so the tower trains and its output cannot be cached.")
    if task.accelerator.num_threads:
        torch.set_num_threads(task.accelerator.num_threads)
    device = pick_device(task.accelerator.device, use_cpu=spec.use_cpu, warn=reporter.warn)
    precision = pick_precision(spec, device)
    processor = load_processor(task.model_dir)
    dataset = Dataset(task.data_dir, media_dir=task.media_dir)
    entries = [dataset.entry(name) for name in (*spec.train_entries, *spec.eval_entries)]
    for entry in entries:
        entry.require_unchanged()
    rows = (row for entry in entries for row in islice(entry.each(), spec.max_samples))
    images = images_by_digest(((path, row.id) for row in rows for path in row.images), dataset.digests)
    if any(entry.videos for entry in entries):
        images |= _videos_of(task, processor, dataset)
    with out_of_memory_is_an_error(f"loading {task.model_dir}", "End other programs."):
        dataset.digests.watch(task.model_dir.glob("*.safetensors"))
        how = {"quantization": precision.quantization, "attention": precision.attention}
        place = quantizing_device(precision.quantization, device.kind)
        model = load_model(task.model_dir, dtype=precision.weights, device=place, **how).eval()
    fingerprint = tower.tower_fingerprint(model, processor, spec, precision, device.kind)
    store = FeatureStore(task.features_root / fingerprint, dataset.digests)
    maker = FeatureMaker(
        model=model,
        collator=make_collator(spec, processor, dataset.digests),
        precision=precision,
        num_workers=spec.dataloader_num_workers,
    )
    with out_of_memory_is_an_error("while the vision tower's output was cached", CURE):
        tower.move(model, device.kind)
        num_computed = store.compute(maker, images, reporter, part=task.part or WHOLE, wait=False)
    has_some = len(store.missing(images)) < len(images)  # a part has not computed all
    by_worker = tuple(part.num_computed for part in task.parts)
    return Features(
        directory=fingerprint,
        digest=digest_json([fingerprint, sorted(images)]),
        tower_fingerprint=fingerprint,
        num_images=len(images),
        num_computed=num_computed + sum(by_worker),
        num_bytes=store.num_bytes(images),
        dtype=str(store.any().dtype).removeprefix("torch.") if has_some else None,
        num_computed_by_worker=by_worker,
    )
