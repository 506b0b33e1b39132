"""Videos as files: what they say of themselves, and some of their frames. PyAV decodes them, which brings FFmpeg."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_assets.data.ingest.spec import MAX_PIXELS
from mllm_assets.errors import DataError, MachineError

# FFmpeg's names of containers. Playlists (HLS, DASH, concat), which name other files and addresses, are not opened
SAFE_CONTAINERS = ("mov", "matroska", "avi", "mpegts", "mpeg", "asf", "flv", "ogg", "gif")


class VideoError(DataError):
    """A video that cannot be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoLimits:
    """Limits for reading untrusted videos."""

    max_bytes: int = 4 * 2**30
    max_duration_s: float = 3600.0
    max_frames: int = 250_000
    max_pixels: int = MAX_PIXELS  # of a frame


DEFAULT_VIDEO_LIMITS = VideoLimits()


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """What a video's file says of it, and how many frames are really there."""

    width: int
    height: int
    num_frames: int
    duration_s: float
    frames_per_s: float

    def places(self, fps: float, most: int) -> list[int]:
        """Which frames are shown: spread evenly from the first to the last, `fps` of each second, `most` at most.

        Source: llamafactory 0.9.5, `MMPluginMixin._get_video_sample_indices`.
        """
        count = min(self.num_frames, most, max(1, math.floor(self.duration_s * fps)))
        return np.linspace(0, self.num_frames - 1, count).astype(np.int32).tolist()


def decoder_name() -> str:
    """PyAV and its version, for what is named by all that made it."""
    return f"av {_av().__version__}"


def video_info(path: Path, limits: VideoLimits = DEFAULT_VIDEO_LIMITS) -> VideoInfo:
    """Read a video's header and count its frames; none is decoded.

    Raises:
        VideoError: Missing, too large, of another format, without frames, or cut off.
        MachineError: PyAV is not installed.
    """
    with _opened(path, limits) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > limits.max_pixels:
            raise VideoError(f"its frames have {width} x {height} pixels, expected at most {limits.max_pixels:,}")
        given, num_frames = 0, 0
        for packet in container.demux(stream):
            if packet.size:
                given += 1
                num_frames += not packet.is_discard
            if given > limits.max_frames:
                raise VideoError(f"it has more than {limits.max_frames:,} frames")
        if not num_frames or not width * height:
            raise VideoError("it has no frame")
        if given < stream.frames:
            raise VideoError(f"it is cut off: {given:,} of its {stream.frames:,} frames are there")
        rate = float(stream.average_rate or 0)
        duration_s = _duration_s(container, stream) or (num_frames / rate if rate else 0.0)
        if duration_s <= 0:
            raise VideoError("it does not say how long it is")
        if duration_s > limits.max_duration_s:
            raise VideoError(f"it lasts {duration_s:,.0f} s, expected at most {limits.max_duration_s:,.0f}")
        return VideoInfo(
            width=width,
            height=height,
            num_frames=num_frames,
            duration_s=duration_s,
            frames_per_s=rate or num_frames / duration_s,
        )


def frames_at(path: Path, places: Sequence[int], limits: VideoLimits = DEFAULT_VIDEO_LIMITS) -> list[Image.Image]:
    """Decode a video up to the last of some frames, given in order by their numbers, and return those as RGB.

    A phone's mark that the picture is to be turned is not obeyed, as in LLaMA-Factory.

    Raises:
        VideoError: As `video_info`, or a frame cannot be decoded.
        MachineError: PyAV is not installed.
    """
    wanted, frames = set(places), []
    with _opened(path, limits) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                if frame.width * frame.height > limits.max_pixels:
                    raise VideoError(f"frame {number} has {frame.width} x {frame.height} pixels")
                frames.append(frame.to_image())
            if number >= places[-1]:
                break
    if len(frames) != len(places):
        raise VideoError(f"it is damaged: of the {len(places)} frames to show {len(frames)} can be decoded")
    return frames


@contextmanager
def _opened(path: Path, limits: VideoLimits) -> Iterator[tuple[Any, Any]]:
    """A container and its first video stream; what FFmpeg says becomes a VideoError."""
    av = _av()
    try:
        if (num_bytes := path.stat().st_size) > limits.max_bytes:
            allowed = limits.max_bytes / 2**30
            raise VideoError(f"it has {num_bytes / 2**30:.1f} GiB, expected at most {allowed:.0f}")
        if not num_bytes:
            raise VideoError("it is empty")
        # through Python's file: a name cannot be read as an address
        options = {"format_whitelist": ",".join(SAFE_CONTAINERS)}
        with path.open("rb") as file, av.open(file, "r", options=options) as container:
            stream = next((stream for stream in container.streams if stream.type == "video"), None)
            if stream is None or stream.codec_context is None:
                raise VideoError("it holds no pictures that can be decoded")
            yield container, stream
    except FileNotFoundError:
        raise VideoError("it does not exist") from None
    except av.FFmpegError as error:  # some of its classes are OSErrors and ValueErrors too
        raise VideoError(f"it is damaged, or no video ({error.strerror or type(error).__name__})") from error
    except OSError as error:
        raise VideoError(f"it cannot be read ({error.strerror or error})") from None


def _duration_s(container: Any, stream: Any) -> float:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else 0.0


def _av() -> Any:
    try:
        import av  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MachineError(
            "Videos are decoded by the package PyAV, which is not installed: pip install 'mllm-assets[video]'"
        ) from None
    return av
