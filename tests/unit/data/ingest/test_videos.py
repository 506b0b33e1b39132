"""Videos are read within limits, and what is none is refused by a sentence."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mllm_assets.data.ingest.videos import DEFAULT_VIDEO_LIMITS, VideoError, VideoInfo, frames_at, video_info
from mllm_assets.errors import MachineError
from tests import clips

pytest.importorskip("av")
INFO = VideoInfo(width=8, height=8, num_frames=100, duration_s=10.0, frames_per_s=10.0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips.write_clip(tmp_path_factory.mktemp("clips") / "a.mp4")


@pytest.mark.parametrize(
    ("fps", "most", "places"),
    [(0.3, 128, [0, 49, 99]), (2.0, 4, [0, 33, 66, 99]), (0.01, 128, [0]), (1000, 3, [0, 49, 99])],
)
def test_frames_are_spread_from_the_first_to_the_last(fps: float, most: int, places: list[int]) -> None:
    assert INFO.places(fps, most) == places


def test_no_more_frames_are_shown_than_there_are() -> None:
    assert replace(INFO, num_frames=5).places(2.0, 128) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_a_container_that_does_not_count_its_frames_is_counted(tmp_path: Path, name: str) -> None:
    """LLaMA-Factory takes the first 128 frames of a Matroska file, whatever `video_fps` is."""
    info = video_info(clips.write_clip(tmp_path / name))
    assert (info.num_frames, info.duration_s, info.frames_per_s) == (30, pytest.approx(3.0), 10.0)


def test_frames_are_those_that_were_written(clip: Path) -> None:
    for number, shown in zip((3, 17, 29), frames_at(clip, [3, 17, 29]), strict=True):
        difference = np.abs(np.asarray(shown, int) - clips.frame(number)).mean()
        assert difference < 12, number


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"max_bytes": 100}, "expected at most"),
        ({"max_duration_s": 2.0}, "it lasts 3 s, expected at most 2"),
        ({"max_frames": 20}, "it has more than 20 frames"),
        ({"max_pixels": 4000}, "its frames have 96 x 64 pixels, expected at most 4,000"),
    ],
)
def test_a_video_beyond_a_limit_is_refused(clip: Path, limits: dict, text: str) -> None:
    with pytest.raises(VideoError, match=text):
        video_info(clip, replace(DEFAULT_VIDEO_LIMITS, **limits))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "it is empty"),
        (b"hello" * 100, "it is damaged, or no video"),
        (b"#EXTM3U\n#EXTINF:9,\n%s\n#EXT-X-ENDLIST\n", "it is damaged, or no video"),
        (b"ffconcat version 1.0\nfile '%s'\n", "it is damaged, or no video"),
    ],
    ids=["empty", "text", "playlist", "list"],
)
def test_what_is_no_video_is_refused(clip: Path, tmp_path: Path, content: bytes, text: str) -> None:
    """A playlist would have other files read, and addresses asked."""
    (tmp_path / "b.mp4").write_bytes(content.replace(b"%s", str(clip).encode()))
    with pytest.raises(VideoError, match=text):
        video_info(tmp_path / "b.mp4")


def test_damage_in_the_middle_is_found_when_frames_are_decoded(clip: Path, tmp_path: Path) -> None:
    data = bytearray(clip.read_bytes())
    start = data.find(b"mdat")
    data[start + 100 : start + 2000] = bytes(1900)
    (tmp_path / "b.mp4").write_bytes(data)
    with pytest.raises(VideoError, match="it is damaged"):
        frames_at(tmp_path / "b.mp4", [0, 15, 29])


def test_a_file_that_ends_before_its_last_frame_is_refused(tmp_path: Path) -> None:
    whole = clips.write_clip(tmp_path / "a.avi").read_bytes()
    (tmp_path / "b.avi").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VideoError, match=r"cut off: \d+ of its 30 frames are there|it is damaged"):
        video_info(tmp_path / "b.avi")


def test_it_is_said_what_to_install(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MachineError, match=r"pip install 'mllm-assets\[video\]'"):
        video_info(clip)
