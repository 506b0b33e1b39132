"""Lets a loaded model answer from its vision tower's cached output.

Each image goes through the tower once, for all questions and scores of all models that share it, training included.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_assets.inference.answerer import Answerer
from mllm_assets.training import features, tower
from mllm_assets.training.device import Device, Precision, pick_precision
from mllm_assets.training.encode import EncodedRow
from mllm_assets.training.spec import TrainSpec

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter


def use_cached_images(
    answerer: Answerer,
    rows: Sequence[EncodedRow],
    features_root: Path,
    spec: TrainSpec,
    device: Device,
    reporter: "Reporter",
) -> Path | None:
    """Compute what is not there of the rows' images, and let it stand in for them; the tower's memory is given back.

    Args:
        answerer: Whose model answers from now on only what is asked of these images.
        rows: All that it will be asked.
        features_root: The folder of all towers' features, shared with training.
        spec: The recipe: its image limits and precision name the features.
        device: Where the model is.
        reporter: Told after each pass of the tower.

    Returns:
        The folder of this tower's features, or None where no row has an image.

    Raises:
        DataError: An image is damaged. Names row and file.
        IntegrityError: Cached features are not those of this tower.
    """
    with_images = [row for row in rows if row.images]
    if not with_images:
        return None
    model = answerer.model
    precision = pick_precision(spec, device)
    if model.dtype != precision.weights:  # the directory keeps another dtype than the recipe trains in
        precision = Precision(weights=model.dtype, autocast=None)
    directory = features_root / tower.tower_fingerprint(model, answerer.processor, spec, precision)
    images = features.images_by_digest(with_images)
    features.compute_missing(model, answerer.collator, images, directory, precision, reporter)
    reader = features.FeatureReader(directory)
    features.require_match(reader, model, answerer.collator, with_images, precision)
    tower.install(model)
    answerer.answer_from(reader)
    return directory
