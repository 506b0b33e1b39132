"""How a model is asked: the turn format of its training, and how its answers are drawn."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllm_assets.errors import MllmAssetsError

# also without a recipe: when a published model is asked, or an image is served
CUTOFF_LEN = 2048
IMAGE_MAX_PIXELS = 768 * 768
IMAGE_MIN_PIXELS = 32 * 32
VIDEO_MAX_PIXELS = 256 * 256
VIDEO_MIN_PIXELS = 16 * 16
VIDEO_FPS = 2.0
VIDEO_MAXLEN = 128
VIDEO_KEYS = ("video_fps", "video_maxlen", "video_max_pixels", "video_min_pixels")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSettings:
    """What is shown of a video: `fps` frames of each second, `maxlen` at most, each of an area within the limits."""

    fps: float = VIDEO_FPS
    maxlen: int = VIDEO_MAXLEN
    max_pixels: int = VIDEO_MAX_PIXELS
    min_pixels: int = VIDEO_MIN_PIXELS


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnSettings:
    """How a conversation becomes tokens; whoever asks a model must do it as its training did.

    Attributes:
        template: Name of the turn format; None for the family's usual one.
        system: System text for rows without one, in recipes `default_system`; None for the format's own, "" for none.
        enable_thinking: What becomes of reasoning in formats that have a place for it. An answer without it gets an
            empty one: supervised if true, part of the question otherwise. False takes it out of all answers.
        cutoff_len: Most tokens a row may have; what is longer is cut as LLaMA-Factory cuts it.
        image_max_pixels: Larger images are first shrunk to this area.
        image_min_pixels: Smaller ones are first enlarged to it.
        video_fps: Frames of each second of a video that are shown.
        video_maxlen: Most frames of a video.
        video_max_pixels: Larger frames are first shrunk to this area.
        video_min_pixels: Smaller ones are first enlarged to it.
        image_do_pan_and_scan: Parts of long images are shown beside the whole (Gemma 3).
        crop_to_patches: Parts of all images are (InternVL).
    """

    template: str | None = None
    system: str | None = None
    enable_thinking: bool | None = True
    cutoff_len: int = CUTOFF_LEN
    image_max_pixels: int = IMAGE_MAX_PIXELS
    image_min_pixels: int = IMAGE_MIN_PIXELS
    image_do_pan_and_scan: bool = False
    crop_to_patches: bool = False
    video_fps: float = VIDEO_FPS
    video_maxlen: int = VIDEO_MAXLEN
    video_max_pixels: int = VIDEO_MAX_PIXELS
    video_min_pixels: int = VIDEO_MIN_PIXELS

    @property
    def crop_keys(self) -> tuple[str, ...]:
        """Which of the keys are set that show parts of images beside the whole."""
        shown = {"image_do_pan_and_scan": self.image_do_pan_and_scan, "crop_to_patches": self.crop_to_patches}
        return tuple(key for key, is_set in shown.items() if is_set)

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> "TurnSettings":
        """Take them from a recipe's keys; absent ones have their defaults."""
        values = {name: recipe[name] for name in cls.__slots__ if name in recipe}
        return cls(**{"system": recipe.get("default_system"), **values})

    @property
    def videos(self) -> VideoSettings:
        """What is shown of videos."""
        return VideoSettings(
            fps=self.video_fps,
            maxlen=self.video_maxlen,
            max_pixels=self.video_max_pixels,
            min_pixels=self.video_min_pixels,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How an answer is drawn. Without `do_sample` the likeliest token is taken; the fields below have no effect."""

    max_new_tokens: int = 100
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise MllmAssetsError(
                f"temperature must be above 0 and top_p in 0..1 (not 0), got {self.temperature} and {self.top_p}. "
                "For the likeliest answer leave sampling off."
            )
