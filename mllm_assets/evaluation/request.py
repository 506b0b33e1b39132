"""What the worker is asked to evaluate, read from JSON."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets.training.spec import CUTOFF_LEN, IMAGE_MAX_PIXELS, IMAGE_MIN_PIXELS, TrainSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateRequest:
    """The request of `predict.evaluate_task`.

    Attributes:
        recipe_name: Title of the gallery.
        model_dir: The tuned model.
        base_model_dir: The one that it was trained from.
        data_dir: The folder of `dataset_info.json`.
        entries: What to ask, by entry.
        directory: Where the predictions go; a complete one is returned as it is.
        models: Which to ask, of "base" and "tuned".
        max_samples: Per entry; None for all.
        max_new_tokens: Per answer.
        do_sample: Draw answers rather than take the likeliest tokens; with `temperature`, `top_p` and `seed`.
        batch_size: Rows that are scored or answered at once.
        features_root: With `recipe`: answer from the vision tower's cached output, which training shares.
        recipe: Names the cached features.
        system: System text for rows without one of their own.
        cutoff_len: As in training; likewise `image_max_pixels`, `image_min_pixels`, `template`, `enable_thinking`.
        part: (index, count): measure that part of the batches alone, and write nothing.
        parts: What those gave, to be put together.
        device: Where to compute: "auto", "cuda", "mps" or "cpu".
        num_threads: Of PyTorch; None for its own choice.
    """

    recipe_name: str
    model_dir: Path
    base_model_dir: Path
    data_dir: Path
    entries: tuple[str, ...]
    directory: Path
    models: tuple[str, ...] = ("base", "tuned")
    max_samples: int | None = None
    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 42
    batch_size: int = 16
    features_root: Path | None = None
    recipe: TrainSpec | None = None
    system: str | None = None
    cutoff_len: int = CUTOFF_LEN
    image_max_pixels: int = IMAGE_MAX_PIXELS
    image_min_pixels: int = IMAGE_MIN_PIXELS
    template: str | None = None
    enable_thinking: bool | None = True
    part: tuple[int, int] | None = None
    parts: tuple[dict[str, dict[str, Any]], ...] = ()
    device: str = "auto"
    num_threads: int | None = None

    @classmethod
    def parse(cls, request: dict[str, Any]) -> "EvaluateRequest":
        """Read the JSON form; what is absent takes its default."""
        known = {name: request[name] for name in cls.__dataclass_fields__ if name in request}
        accelerator = request.get("accelerator") or {}
        paths = {name: Path(known[name]) for name in ("model_dir", "base_model_dir", "data_dir", "directory")}
        return cls(
            **{
                **known,
                **paths,
                "entries": tuple(known["entries"]),
                "models": tuple(known.get("models") or ("base", "tuned")),
                "part": tuple(known["part"]) if known.get("part") else None,
                "parts": tuple(known.get("parts") or ()),
                "features_root": Path(root) if (root := known.get("features_root")) else None,
                "recipe": TrainSpec.from_dict(recipe) if (recipe := known.get("recipe")) else None,
                "device": accelerator.get("device") or "auto",
                "num_threads": accelerator.get("num_threads"),
            }
        )
