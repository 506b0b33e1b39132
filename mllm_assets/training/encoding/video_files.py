"""Video files as the processor gets them: frames that LLaMA-Factory would take, each within the limits of area."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from mllm_assets.data.ingest.videos import VideoError, VideoInfo, frames_at, video_info
from mllm_assets.errors import DataError
from mllm_assets.families.image_slots import ImageSlots
from mllm_assets.families.video_slots import Clip
from mllm_assets.recipe.asking import VideoSettings
from mllm_assets.training.encoding.image_files import sizes_in_area


def clip_of(path: Path, how: VideoSettings, slots: ImageSlots, *, row_id: str = "") -> Clip:
    """What is shown of a video, from its header alone.

    Raises:
        DataError: The file is not a video that can be used. Names the row and the file.
    """
    with _naming(path, row_id):
        info = video_info(path)
    places = info.places(how.fps, how.maxlen)
    width, height = _sizes(info.width, info.height, how, slots)[-1]
    return Clip(
        num_frames=len(places),
        width=width,
        height=height,
        seconds=[place / info.frames_per_s for place in places],
        frames_per_s=len(places) / info.duration_s,
    )


def clip_frames(path: Path, how: VideoSettings, slots: ImageSlots, *, row_id: str = "") -> list[Image.Image]:
    """Decode the frames of a video that are shown, each brought to the size of its `Clip`.

    Raises:
        DataError: The file is not a video that can be used. Names the row and the file.
    """
    with _naming(path, row_id):
        info = video_info(path)
        frames = frames_at(path, info.places(how.fps, how.maxlen))
        return [_fitted(frame, info, how, slots) for frame in frames]


def _fitted(frame: Image.Image, info: VideoInfo, how: VideoSettings, slots: ImageSlots) -> Image.Image:
    """Resize a frame step by step, as LLaMA-Factory does."""
    if frame.size != (info.width, info.height):
        raise VideoError("the size of its frames changes")
    for size in _sizes(*frame.size, how, slots):
        frame = frame if size == frame.size else frame.resize(size)
    return frame.convert("RGB")


def _sizes(width: int, height: int, how: VideoSettings, slots: ImageSlots) -> list[tuple[int, int]]:
    sizes = [(width, height), *sizes_in_area(width, height, how.max_pixels, how.min_pixels)]
    return [*sizes, slots.fitted(*sizes[-1])]


@contextmanager
def _naming(path: Path, row_id: str) -> Iterator[None]:
    try:
        yield
    except VideoError as error:
        where = f" of row {row_id}" if row_id else ""
        raise DataError(
            f"The video {path}{where} cannot be used: {error}. Replace the file or drop the row."
        ) from error
