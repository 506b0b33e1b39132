"""The frozen vision tower's output, computed once per image and shared by every recipe with the same tower.

A feature is named by the image's bytes, below a folder named by all else that it depends on. See docs/feature-cache.md.

Shape suffixes: K tokens of one image, R tokens of several, W values kept of a token.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.data import DataLoader

from mllm_assets.artifacts import digest_json, sha256_file
from mllm_assets.errors import IntegrityError, RecipeError
from mllm_assets.training import tower
from mllm_assets.training.collate import Collator
from mllm_assets.training.device import Precision, pick_device, pick_precision
from mllm_assets.training.encode import EncodedRow
from mllm_assets.training.shards import ShardStore
from mllm_assets.training.spec import TrainSpec

if TYPE_CHECKING:
    from mllm_assets.data.sharegpt import Row
    from mllm_assets.training.protocol import Reporter

NUM_IMAGES_PER_SHARD = 64
NUM_IMAGES_PER_PASS = {"cpu": 4, "cuda": 32, "mps": 8}
T = TypeVar("T")
NUM_PROBES = 3
# Two batch sizes of one tower differ by rounding: 1e-6 relative in float32, one unit in the last place in bfloat16
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class FeatureReader:
    """Features of images, a row for each token, read by image file through a memory map."""

    def __init__(self, directory: Path) -> None:
        self.store = ShardStore(directory)
        self._digests: dict[Path, str] = {}

    def batch(self, paths: Sequence[Path]) -> torch.Tensor:
        """Return rows_RW of all images, one after another.

        Raises:
            IntegrityError: An image is not among those computed. Names the file.
        """
        return torch.cat([self.store.get(self.name(path)) for path in paths])

    def blank(self, num_tokens: int) -> torch.Tensor:
        """Return rows_KW of zeros for one image of so many tokens, for a batch without images."""
        some_KW = self.store.get(self.store.any_name())
        return some_KW.new_zeros(num_tokens, some_KW.shape[1])

    def name(self, path: Path) -> str:
        """Return the digest of an image that is there.

        Raises:
            IntegrityError: It is not. Names the file.
        """
        if path not in self._digests:
            self._digests[path] = sha256_file(path)
        if self._digests[path] not in self.store:
            raise IntegrityError(
                f"The image {path} has no cached vision features in {self.store.directory}: the data changed after "
                f"they were made. Materialise vision_features again."
            )
        return self._digests[path]


def images_by_digest(rows: Iterable["EncodedRow | Row"]) -> dict[str, EncodedRow]:
    """Return each different image once, by the digest of its bytes, as a row of its own that names where it stands."""
    found: dict[str, EncodedRow] = {}
    seen: set[Path] = set()
    for row in rows:
        for path in row.images:
            if path not in seen:
                seen.add(path)
                found.setdefault(sha256_file(path), EncodedRow(id=row.id, input_ids=(), labels=(), images=(path,)))
    return found


def compute_missing(
    model: Any,
    collator: Collator,
    images: Mapping[str, EncodedRow],
    directory: Path,
    precision: Precision,
    reporter: "Reporter",
    *,
    num_workers: int = 0,
    part: tuple[int, int] = (0, 1),
    wait: bool = True,
) -> int:
    """Compute the features of the images that are not in `directory` yet, shard by shard.

    A damaged shard is deleted and its images are computed afresh. Killed, the next call goes on behind the last shard.

    Args:
        model: On the device that computes, in `eval` mode.
        collator: Makes pixels of a row's images.
        images: From `images_by_digest`.
        directory: `<features_root>/<tower fingerprint>`.
        precision: The training step's.
        reporter: Told after each pass.
        num_workers: Processes that decode images.
        part: `(index, count)`: compute every count-th pass of the tower only. A pass holds the same images however
            many parts there are, so that its features are the same bits.
        wait: Whether to wait for the processes that compute the other parts.

    Returns:
        How many images were computed.

    Raises:
        DataError: An image is damaged. Names row and file.
    """
    store = ShardStore(directory)
    for damage in store.drop_damaged(images) if part[1] == 1 else ():
        reporter.warn(f"Cached vision features were damaged and are computed again: {damage}.")
    device = tower.device_of(model).type
    passes = list(_chunks(sorted(images), NUM_IMAGES_PER_PASS[device]))
    names = store.missing(name for some in passes[part[0] :: part[1]] for name in some)
    done = 0
    for shard_names in _chunks(names, NUM_IMAGES_PER_SHARD):
        pixels = DataLoader(
            [images[name] for name in shard_names],  # pyright: ignore[reportArgumentType]
            batch_size=NUM_IMAGES_PER_PASS[device],
            collate_fn=collator.tower_inputs,
            num_workers=num_workers,
        )
        computed: list[torch.Tensor] = []
        for inputs in pixels:
            computed += [rows_KW.cpu().clone() for rows_KW in tower.image_rows(model, inputs, precision)]
            reporter.progress("vision_features", done + len(computed), len(names))
        done += len(computed)
        store.add(dict(zip(shard_names, computed, strict=True)))
    if wait:
        store.wait_for(images.keys())
    return len(names)


def _chunks(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), size):
        yield names[start : start + size]


def require_fingerprint(directory: Path, fingerprint: str) -> None:
    """Refuse the features of another tower.

    Raises:
        IntegrityError: `directory` is not the fingerprint's.
    """
    if directory.name != fingerprint:
        raise IntegrityError(
            f"The vision features in {directory} are of tower {directory.name}, and this model's is {fingerprint}: "
            f"weights, image size limits, precision or library versions differ. Make them again."
        )


def require_match(
    reader: FeatureReader, model: Any, collator: Collator, rows: Sequence[EncodedRow], precision: Precision
) -> None:
    """Compare the shards that will be read with their digests, and some features with the tower's own output.

    Raises:
        IntegrityError: An image is not there, a file is damaged, or a value differs.
    """
    reader.store.require_undamaged([reader.name(path) for row in rows for path in row.images])
    for row in probes([row for row in rows if row.images]):
        fresh = torch.cat(tower.image_rows(model, collator.tower_inputs([row]), precision)).cpu()
        difference = relative_difference(reader.batch(row.images), fresh)
        if difference > TOLERANCE[fresh.dtype]:
            raise IntegrityError(
                f"The cached vision features of row {row.id} differ from the tower's output by {difference:.1e} of "
                f"the largest value, expected at most {TOLERANCE[fresh.dtype]:.0e}. "
                f"Delete {reader.store.directory} and make them again."
            )


def probes(rows: Sequence[T]) -> Sequence[T]:
    """Return a few rows spread over all of them."""
    return rows[:: max(1, len(rows) // NUM_PROBES)][:NUM_PROBES]


def relative_difference(cached: torch.Tensor, fresh: torch.Tensor) -> float:
    """Return the largest difference as a share of the largest value; infinite for another shape or dtype."""
    if cached.shape != fresh.shape or cached.dtype != fresh.dtype:
        return float("inf")
    return float((cached.float() - fresh.float()).abs().max() / fresh.float().abs().max().clamp(min=1e-6))


def features_task(request: dict[str, Any], reporter: "Reporter") -> dict[str, Any]:
    """Worker entry: the features of all images of a recipe's training and evaluation entries.

    Reads `recipe`, `model_dir`, `data_dir`, `features_root` and `accelerator`; the result has `directory` (relative to
    `features_root`), `digest` (of tower and images), `tower_fingerprint`, `num_images`, `num_computed`, `num_bytes`
    and `dtype`. With `part` (index, count) only that part is computed, and the result has `num_computed` alone; the
    request without it, with those results as `parts`, computes what is still missing and counts them in.

    Raises:
        RecipeError: The recipe trains the tower.
    """
    from mllm_assets.data.sharegpt import load_rows
    from mllm_assets.training.inputs import make_collator
    from mllm_assets.training.model import load_model, load_processor, quiet_libraries

    quiet_libraries()
    spec = TrainSpec.from_dict(request["recipe"])
    if not spec.freeze_vision_tower:
        raise RecipeError("freeze_vision_tower is false, so the tower trains and its output cannot be cached.")
    accelerator = request.get("accelerator") or {}
    if accelerator.get("num_threads"):
        torch.set_num_threads(int(accelerator["num_threads"]))
    device = pick_device(accelerator.get("device", "auto"), use_cpu=spec.use_cpu)
    precision = pick_precision(spec, device)
    model_dir, root = Path(request["model_dir"]), Path(request["features_root"])
    processor = load_processor(model_dir)
    images = images_by_digest(
        row
        for entry in (*spec.train_entries, *spec.eval_entries)
        for row in load_rows(Path(request["data_dir"]), entry, max_samples=spec.max_samples)
    )
    model = load_model(model_dir, dtype=precision.weights, quantization=precision.quantization).eval()
    fingerprint = tower.tower_fingerprint(model, processor, spec, precision)
    tower.move(model, device.kind)
    index, count = request.get("part") or (0, 1)
    num_computed = compute_missing(
        model, make_collator(spec, processor), images, root / fingerprint, precision, reporter,
        num_workers=spec.dataloader_num_workers, part=(index, count), wait=False,
    )  # fmt: skip
    if request.get("part"):
        return {"num_computed": num_computed}
    by_worker = [part["num_computed"] for part in request.get("parts") or ()]
    store = ShardStore(root / fingerprint)
    return {
        "directory": fingerprint,
        "digest": digest_json([fingerprint, sorted(images)]),
        "tower_fingerprint": fingerprint,
        "num_images": len(images),
        "num_computed": num_computed + sum(by_worker),
        **({"num_computed_by_worker": by_worker} if by_worker else {}),
        "num_bytes": store.num_bytes(images),
        "dtype": str(store.get(min(images)).dtype).removeprefix("torch.") if images else None,
    }
