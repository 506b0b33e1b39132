"""The frozen vision tower's output, computed once per image.

The projector begins with an average pool over the tower's output, so the smallest thing to keep is the pooled output:
for gemma-3-4b 256 x 1152 values an image in place of 4096 x 1152. While training, a module that hands these rows on
stands in the tower's place and the projector's pool becomes the identity; `forward` stays the library's.

Shape suffixes: N images, K image tokens, H the tower's hidden size, C H W pixels.
Not covered: towers that train, in part or whole (refused); pan-and-scan crops.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm_assets.artifacts import (
    digest_json,
    find_damage,
    is_complete,
    read_manifest,
    sha256_file,
    staged_directory,
    write_manifest,
)
from mllm_assets.errors import IntegrityError, RecipeError
from mllm_assets.training.collate import Collator
from mllm_assets.training.encode import EncodedRow
from mllm_assets.training.spec import TrainSpec

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter

FEATURES_FILE = "features.safetensors"
TENSOR = "pooled_NKH"
NUM_PROBES = 3
# Two batch sizes of one tower differ by rounding: 1e-6 relative in float32, one unit in the last place in bfloat16
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class CachedTower(nn.Module):
    """Stands in the vision tower's place: its input already is the tower's pooled output."""

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values)  # pyright: ignore[reportArgumentType]


class FeatureStore:
    """Pooled features of a set of images, read by image file.

    Raises:
        IntegrityError: The directory is incomplete or damaged.
    """

    def __init__(self, directory: Path) -> None:
        damage = find_damage(directory)
        if damage is not None:
            raise IntegrityError(
                f"The vision features in {directory} are damaged: {damage}. Delete it and make it again."
            )
        self.directory = directory
        self.manifest = read_manifest(directory)
        self._index: dict[str, int] = self.manifest["images"]
        self._digests: dict[Path, str] = {}
        self._file: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # a loader process opens the file itself

    def batch(self, paths: Sequence[Path]) -> torch.Tensor:
        """Return features_NKH, one row per path.

        Raises:
            IntegrityError: An image is not among those computed. Names the file.
        """
        if self._file is None:
            self._file = safe_open(self.directory / FEATURES_FILE, framework="pt")
        rows = self._file.get_slice(TENSOR)
        return torch.stack([rows[self._row(path)] for path in paths])

    def blank(self) -> torch.Tensor:
        """Return features_1KH of zeros, for a batch without images."""
        return torch.zeros(1, *self.manifest["shape"][1:], dtype=getattr(torch, self.manifest["dtype"]))

    def _row(self, path: Path) -> int:
        if path not in self._digests:
            self._digests[path] = sha256_file(path)
        row = self._index.get(self._digests[path])
        if row is None:
            raise IntegrityError(
                f"The image {path} has no cached vision features in {self.directory}: the data changed after they were "
                f"made. Materialise vision_features again."
            )
        return row


def tower_fingerprint(model: Any, processor: Any, spec: TrainSpec) -> str:
    """Digest all that a feature depends on but the image: weights, processing, dtype, versions (16 hex)."""
    tower = model.model.vision_tower
    weights = {name: _tensor_digest(tensor) for name, tensor in sorted(tower.state_dict().items())}
    return digest_json(
        {
            "weights": weights,
            "config": tower.config.to_dict(),
            "mm_tokens_per_image": model.config.mm_tokens_per_image,
            "image_processor": processor.image_processor.to_dict(),
            "image_max_pixels": spec.image_max_pixels,
            "image_min_pixels": spec.image_min_pixels,
            "versions": [torch.__version__, transformers.__version__, tokenizers.__version__],
        }
    )[:16]


def compute(
    model: Any, collator: Collator, rows: Sequence[EncodedRow], root: Path, fingerprint: str, reporter: "Reporter"
) -> Path:
    """Compute the features of all images of `rows` below `root`, or find them there.

    Returns:
        `root/<tower fingerprint>/<digest of the images>`, complete.

    Raises:
        DataError: An image is damaged. Names row and file.
    """
    images = {sha256_file(path): (row, path) for row in rows for path in row.images}
    names = sorted(images)
    directory = root / fingerprint / digest_json(names)[:16]
    if is_complete(directory):
        return directory
    pooled = []
    for done, name in enumerate(names, start=1):
        row, path = images[name]
        one = EncodedRow(id=row.id, input_ids=(), labels=(), images=(path,))
        pooled.append(pooled_output(model, collator.pixels([one])).cpu())
        reporter.progress("vision_features", done, len(names))
    features_NKH = torch.cat(pooled)
    with staged_directory(directory) as staging:
        save_file({TENSOR: features_NKH}, staging / FEATURES_FILE, metadata={"format": "pt"})
        write_manifest(
            staging,
            {
                "tower_fingerprint": fingerprint,
                "digest": digest_json([fingerprint, names]),
                "num_images": len(names),
                "shape": list(features_NKH.shape),
                "dtype": str(features_NKH.dtype).removeprefix("torch."),
                "images": {name: index for index, name in enumerate(names)},
            },
        )
    return directory


@torch.no_grad()
def pooled_output(model: Any, pixel_values_NCHW: torch.Tensor) -> torch.Tensor:
    """Return what the projector's pool makes of the tower's output: features_NKH in the tower's dtype."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    weight = tower.post_layernorm.weight
    hidden = tower(pixel_values=pixel_values_NCHW.to(weight.device, weight.dtype)).last_hidden_state
    num_images, _, width = hidden.shape
    side = projector.patches_per_image
    grid = hidden.transpose(1, 2).reshape(num_images, width, side, side).contiguous()
    return projector.avg_pool(grid).flatten(2).transpose(1, 2).contiguous()


def require_match(store: FeatureStore, model: Any, collator: Collator, rows: Sequence[EncodedRow], spec: TrainSpec,
                  processor: Any) -> None:  # fmt: skip
    """Refuse features of another tower, and compare some with the tower's own output before the first step.

    Raises:
        IntegrityError: The tower, the processing or a value differs.
    """
    fingerprint = tower_fingerprint(model, processor, spec)
    if store.manifest["tower_fingerprint"] != fingerprint:
        raise IntegrityError(
            f"The vision features in {store.directory} are of tower {store.manifest['tower_fingerprint']}, and this "
            f"model's is {fingerprint}: weights, image size limits or library versions differ. Make them again."
        )
    with_images = [row for row in rows if row.images]
    for row in with_images[:: max(1, len(with_images) // NUM_PROBES)][:NUM_PROBES]:
        cached = store.batch(row.images).float()
        fresh = pooled_output(model, collator.pixels([row])).cpu()
        scale = fresh.float().abs().max().clamp(min=1e-6)
        difference = float((cached - fresh.float()).abs().max() / scale)
        if difference > TOLERANCE[fresh.dtype]:
            raise IntegrityError(
                f"The cached vision features of row {row.id} differ from the tower's output by {difference:.1e} of "
                f"the largest value, expected at most {TOLERANCE[fresh.dtype]:.0e}. "
                f"Delete {store.directory} and make them again."
            )


def install(model: Any, names: Sequence[str]) -> nn.Module:
    """Put the cache in the tower's place and return the tower, for `uninstall`.

    Args:
        model: A `Gemma3ForConditionalGeneration`.
        names: What trains.

    Raises:
        RecipeError: A parameter of the tower trains, so its output changes at every step.
    """
    trained = [name for name in names if "vision_tower" in name]
    if trained:
        raise RecipeError(
            f"Cached vision features cannot stand in for a tower that trains ({len(trained)} parameters, such as "
            f"{trained[0]}). Set freeze_vision_tower: true or train without the cache."
        )
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    model.model.vision_tower = CachedTower()
    projector.patches_per_image = projector.tokens_per_side
    projector.avg_pool = nn.Identity()
    return tower


def uninstall(model: Any, tower: nn.Module) -> None:
    """Put the tower back, as `install` found it."""
    projector = model.model.multi_modal_projector
    model.model.vision_tower = tower
    projector.patches_per_image = model.config.vision_config.image_size // model.config.vision_config.patch_size
    projector.avg_pool = nn.AvgPool2d(kernel_size=projector.kernel_size, stride=projector.kernel_size)


def features_task(request: dict[str, Any], reporter: "Reporter") -> dict[str, Any]:
    """Worker entry: the features of all images of a recipe's training and evaluation entries.

    Reads `recipe`, `model_dir`, `data_dir`, `features_root` and `accelerator`; the result has `directory` (relative to
    `features_root`), `digest`, `tower_fingerprint`, `num_images`, `num_bytes` and `dtype`.

    Raises:
        RecipeError: The recipe trains the tower.
    """
    from mllm_assets.data.sharegpt import load_rows
    from mllm_assets.training import memory
    from mllm_assets.training.families import processor_family
    from mllm_assets.training.inputs import make_encoder
    from mllm_assets.training.model import load_model, load_processor, quiet_libraries

    quiet_libraries()
    spec = TrainSpec.from_dict(request["recipe"])
    if not spec.freeze_vision_tower:
        raise RecipeError("freeze_vision_tower is false, so the tower trains and its output cannot be cached.")
    accelerator = request.get("accelerator") or {}
    if accelerator.get("num_threads"):
        torch.set_num_threads(int(accelerator["num_threads"]))
    device = memory.pick_device(accelerator.get("device", "auto"), use_cpu=spec.use_cpu)
    precision = memory.pick_precision(spec, device)
    model_dir, root = Path(request["model_dir"]), Path(request["features_root"])
    processor = load_processor(model_dir)
    family = processor_family(processor)
    if family.model_type != "gemma3":
        raise RecipeError(
            f"The vision features of {family.name} cannot be cached yet. Set feature_cache: false in the component's "
            f"YAML and train without."
        )
    encoder = make_encoder(spec, processor, model_dir)
    rows = [
        encoder.encode(row)
        for entry in (*spec.train_entries, *spec.eval_entries)
        for row in load_rows(Path(request["data_dir"]), entry, max_samples=spec.max_samples)
    ]
    model = load_model(model_dir, dtype=precision.weights, device=device.kind)
    model.eval()
    collator = Collator(
        processor, image_max_pixels=spec.image_max_pixels, image_min_pixels=spec.image_min_pixels
    )  # fmt: skip
    directory = compute(model, collator, rows, root, tower_fingerprint(model, processor, spec), reporter)
    manifest = read_manifest(directory)
    return {
        "directory": directory.relative_to(root).as_posix(),
        "num_bytes": manifest["files"][FEATURES_FILE]["num_bytes"],
        **{key: manifest[key] for key in ("digest", "tower_fingerprint", "num_images", "dtype")},
    }


def _tensor_digest(tensor: torch.Tensor) -> str:
    import hashlib

    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(str(tensor.dtype).encode() + data.tobytes()).hexdigest()
