"""Small videos, encoded here by PyAV: a square that moves over a changing ground."""

from pathlib import Path
from typing import Any

import numpy as np

SIZE = (96, 64)


def frame(number: int, size: tuple[int, int] = SIZE, *, seed: int = 0) -> np.ndarray:
    """One picture of a clip, pixels_HWC."""
    width, height = size
    pixels_HWC = np.zeros((height, width, 3), np.uint8)
    pixels_HWC[:] = (40 + 37 * seed) % 256, (7 * number) % 256, 120
    left = (5 * number + 11 * seed) % max(1, width - 16)
    pixels_HWC[height // 4 : height // 2, left : left + 16] = 250, 200, 30
    return pixels_HWC


def write_clip(path: Path, *, num_frames: int = 30, fps: int = 10, size: tuple[int, int] = SIZE, seed: int = 0) -> Path:
    """Write a clip, whose pictures are the same for the same arguments."""
    import av

    container: Any = av.open(str(path), "w")
    with container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for number in range(num_frames):
            shown = av.VideoFrame.from_ndarray(frame(number, size, seed=seed), format="rgb24")
            container.mux(stream.encode(shown))
        container.mux(stream.encode())
    return path
