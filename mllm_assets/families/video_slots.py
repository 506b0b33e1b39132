"""How many tokens a video takes, which text surrounds them, and what the tower sees of its frames.

transformers' video processors need torchvision; here is their arithmetic, with the pictures' own resizing.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """The frames of a video that are shown: how many, of which size, when, and how many of each second."""

    num_frames: int
    width: int
    height: int
    seconds: Sequence[float]
    frames_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSlot:
    """The text that represents one video, with `num_tokens` video tokens in it.

    `grid_thw` is its patches in time, height and width; `seconds_per_grid` how long each of those in time lasts.
    """

    text: str
    num_tokens: int
    grid_thw: tuple[int, int, int]
    seconds_per_grid: float

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid_thw)


class VideoSlots(ABC):
    """How one processor treats videos.

    Attributes:
        are_pictures: Whether the tower gets them as it gets the parts of pictures, with the pictures' token.
    """

    are_pictures = False

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that a video's tokens and pixels depend on beside its frames."""

    @abstractmethod
    def slot(self, clip: Clip) -> VideoSlot:
        """What represents a video."""

    @abstractmethod
    def patches(self, frames: Sequence[Image.Image], grid_thw: tuple[int, int, int]) -> np.ndarray:
        """What the tower sees of a video whose slot has this grid."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Processing:
    """A Qwen model's own settings for videos, as its files have them."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    size: Mapping[str, int]
    image_mean: Sequence[float]
    image_std: Sequence[float]
    resample: int = Image.Resampling.BICUBIC
    rescale_factor: float = 1 / 255

    @classmethod
    def read(cls, directory: Path, defaults: Mapping[str, Any]) -> "Processing":
        """From the file that transformers reads them from: one with a video's settings, or those of pictures."""
        found: dict[str, Any] | None = _json(directory / "processor_config.json").get("video_processor")
        for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
            found = _json(directory / name) or None if found is None else found
        known = {**defaults, **{name: value for name, value in (found or {}).items() if name in cls.__slots__}}
        if defaults.get("takes_pixels"):  # an older notation of `size`
            for edge, older in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
                if (pixels := (found or {}).get(older)) is not None:
                    known["size"] = {**known["size"], edge: pixels}
        return cls(**{name: value for name, value in known.items() if name in cls.__slots__})


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class GridVideos(VideoSlots):
    """Qwen2.5-VL: two frames are one step in time, and each has as many tokens as merged patches."""

    defaults: Mapping[str, Any] = {
        "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}, "takes_pixels": True,
    }  # fmt: skip

    def __init__(self, processor: Any, token: str) -> None:
        self.how = Processing.read(processor.directory, self.defaults)
        self.token = token

    def describe(self) -> dict[str, Any]:
        how = self.how
        names = ("patch_size", "temporal_patch_size", "merge_size", "size", "image_mean", "image_std", "resample")
        return {"kind": type(self).__name__, **{name: getattr(how, name) for name in (*names, "rescale_factor")}}

    def slot(self, clip: Clip) -> VideoSlot:
        how = self.how
        num_frames = clip.num_frames + clip.num_frames % 2  # LLaMA-Factory shows the last one twice
        height, width = self._resized(num_frames, clip.height, clip.width)
        steps = -(-num_frames // how.temporal_patch_size)
        grid = (steps, height // how.patch_size, width // how.patch_size)
        num_tokens = math.prod(grid) // how.merge_size**2
        return VideoSlot(
            text=self._text(clip, steps, num_tokens),
            num_tokens=num_tokens,
            grid_thw=grid,
            seconds_per_grid=how.temporal_patch_size / clip.frames_per_s,
        )

    def patches(self, frames: Sequence[Image.Image], grid_thw: tuple[int, int, int]) -> np.ndarray:
        how, (steps, rows, columns) = self.how, grid_thw
        size = (columns * how.patch_size, rows * how.patch_size)
        shown = [frame.resize(size, Image.Resampling(how.resample)) for frame in frames]
        shown += shown[-1:] * (steps * how.temporal_patch_size - len(shown))
        mean, std = (np.array(values, np.float32) for values in (how.image_mean, how.image_std))
        values = (np.stack([np.asarray(frame, np.float32) for frame in shown]) * how.rescale_factor - mean) / std
        cut = values.transpose(0, 3, 1, 2).reshape(
            steps, how.temporal_patch_size, values.shape[-1],
            rows // how.merge_size, how.merge_size, how.patch_size,
            columns // how.merge_size, how.merge_size, how.patch_size,
        )  # fmt: skip
        return cut.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(steps * rows * columns, -1).astype(np.float32)

    def _resized(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        how = self.how
        return smart_resize(
            height,
            width,
            factor=how.patch_size * how.merge_size,
            min_pixels=how.size["shortest_edge"],
            max_pixels=how.size["longest_edge"],
        )

    def _text(self, clip: Clip, steps: int, num_tokens: int) -> str:
        return f"<|vision_start|>{self.token * num_tokens}<|vision_end|>"


class TimedVideos(GridVideos):
    """Qwen3-VL: the time is written before each step, and the limits of `size` are those of all frames together."""

    defaults: Mapping[str, Any] = {
        "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3,
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
    }  # fmt: skip

    def _resized(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Source: transformers 5.23, `smart_resize` of models/qwen3_vl/video_processing_qwen3_vl.py."""
        how, factor = self.how, self.how.patch_size * self.how.merge_size
        if height < factor or width < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        rows, columns = round(height / factor) * factor, round(width / factor) * factor
        area = round(num_frames / how.temporal_patch_size) * how.temporal_patch_size * rows * columns
        if area > how.size["longest_edge"]:
            beta = math.sqrt(num_frames * height * width / how.size["longest_edge"])
            return tuple(max(factor, math.floor(edge / beta / factor) * factor) for edge in (height, width))  # pyright: ignore[reportReturnType]
        if area < how.size["shortest_edge"]:
            beta = math.sqrt(how.size["shortest_edge"] / (num_frames * height * width))
            return tuple(math.ceil(edge * beta / factor) * factor for edge in (height, width))  # pyright: ignore[reportReturnType]
        return rows, columns

    def _text(self, clip: Clip, steps: int, num_tokens: int) -> str:
        # in pairs by `merge_size`, as LLaMA-Factory calls `Qwen3VLProcessor._calculate_timestamps`
        size, seconds = self.how.merge_size, list(clip.seconds)
        seconds += seconds[-1:] * (-len(seconds) % size)
        times = [(seconds[at] + seconds[at + size - 1]) / 2 for at in range(0, len(seconds), size)]
        shown = f"<|vision_start|>{self.token * (num_tokens // steps)}<|vision_end|>"
        return "".join(f"<{time:.1f} seconds>{shown}" for time in times[:steps])


ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen").split()  # fmt: skip
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(number: int) -> str:
    """An English number as the package num2words writes it; from 1000 on in figures."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")
    if number < 1000:
        return f"{ONES[number // 100]} hundred" + (f" and {in_words(number % 100)}" if number % 100 else "")
    return str(number)


class TiledVideos(VideoSlots):
    """SmolVLM: each frame is one part of a picture, behind its time.

    Source: transformers 5.23, models/smolvlm/processing_smolvlm.py and video_processing_smolvlm.py.
    """

    are_pictures = True

    def __init__(self, processor: Any, token: str) -> None:
        self.how, self.token = processor.image_processor, token
        self.side_px = self.how.max_image_size["longest_edge"]
        self.num_patches = self.side_px // processor.vision_config.patch_size
        self.tokens_per_frame = int(processor.settings()["image_seq_len"])

    def describe(self) -> dict[str, Any]:
        how = self.how
        pixels = [list(how.image_mean), list(how.image_std), int(how.resample), how.rescale_factor]
        return {"kind": type(self).__name__, "side_px": self.side_px, "tokens": self.tokens_per_frame, "pixels": pixels}

    def slot(self, clip: Clip) -> VideoSlot:
        duration = timedelta(seconds=int(round(clip.num_frames / clip.frames_per_s, 6)))
        frame = f"<fake_token_around_image><global-img>{self.token * self.tokens_per_frame}<fake_token_around_image>"
        times = [f"{int(seconds // 60):02d}:{int(seconds % 60):02d}" for seconds in clip.seconds]
        shown = "".join(f"\nFrame from {time}:{frame}" for time in times)
        count = in_words(clip.num_frames)
        intro = f"You are provided the following series of {count} frames from a {duration} [H:MM:SS] video.\n"
        return VideoSlot(
            text=f"{intro}{shown}\n\n",
            num_tokens=clip.num_frames * self.tokens_per_frame,
            grid_thw=(clip.num_frames, self.num_patches, self.num_patches),
            seconds_per_grid=1 / clip.frames_per_s,
        )

    def patches(self, frames: Sequence[Image.Image], grid_thw: tuple[int, int, int]) -> np.ndarray:
        how, size = self.how, (self.side_px, self.side_px)
        shown = [np.asarray(frame.resize(size, Image.Resampling(how.resample)), np.float32) for frame in frames]
        mean, std = (np.array(values, np.float32) for values in (how.image_mean, how.image_std))
        return ((np.stack(shown) * how.rescale_factor - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
