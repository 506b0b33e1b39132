"""Decoding in worker processes: in order, cut at its limits, and a dead worker costs one image."""

import io
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
from PIL import Image

from mllm_assets.data.quality import decoding
from mllm_assets.data.quality.decoding import measure_images
from tests.processes import memory_bytes, those_that_run
from tests.unit.data.quality.made_images import encode, limits, measure, picture

pytestmark = pytest.mark.not_fast


@pytest.fixture(scope="module")
def slow() -> bytes:
    """A tenth of a second and more in a native decoder, from a file of 100 KB."""
    buffer = io.BytesIO()
    Image.new("RGB", (6000, 6000), "white").save(buffer, "PNG")
    return buffer.getvalue()


def workers() -> list[psutil.Process]:
    return those_that_run("mllm_assets.data.quality.decoding", psutil.Process().children())


def test_measurements_come_in_order_and_are_those_of_this_process() -> None:
    images = [encode(picture(n)) for n in range(30)] + [b"", b"junk", encode(picture(1))[:200]]
    assert list(measure_images(images, limits())) == [measure(data) for data in images]


def test_workers_serve_the_next_call_too() -> None:
    list(measure_images([encode(picture(1))], limits()))
    before = {process.pid for process in workers()}
    list(measure_images([encode(picture(2))], limits()))
    assert before and {process.pid for process in workers()} == before
    assert len(before) <= decoding.num_workers()


def test_a_second_worker_starts_only_for_what_takes_longer_than_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "num_workers", lambda: 2)
    for alone_s, num_started in ((60, 1), (0, 2)):
        decoding.end_workers()
        monkeypatch.setattr(decoding, "ALONE_S", alone_s)
        list(measure_images((encode(picture(n)) for n in range(20)), limits()))
        assert len(workers()) == num_started


@pytest.mark.attack("pictures")
def test_a_decoder_that_does_not_end_is_cut_and_the_others_go_on(slow: bytes) -> None:
    """Nothing inside the process could stop it: the time is spent in native code."""
    started = time.process_time()
    images = [encode(picture(1)), slow, encode(picture(2))]
    measured = list(measure_images(images, limits(max_decode_s=0.05)))
    assert [image.defect for image in measured] == [None, "image_decode_too_slow", None]
    assert measured[1].num_bytes == len(slow)
    assert time.process_time() - started < 2
    assert [image.defect for image in measure_images([slow], limits(max_decode_s=60))] == [None]


@pytest.mark.attack("pictures")
def test_a_decoder_that_crashes_costs_its_image_only(slow: bytes) -> None:
    def kill_when_busy() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for process in workers():
                if memory_bytes(process) > 150 * 2**20:  # it holds the picture, of which more is to be measured
                    process.kill()
                    return

    killer = threading.Thread(target=kill_when_busy)
    killer.start()
    measured = list(measure_images([slow, encode(picture(2))], limits()))
    killer.join()
    assert [image.defect for image in measured] == ["image_decoder_crashed", None]


def test_few_images_are_in_memory_at_once() -> None:
    taken = 0

    def images() -> Iterator[bytes]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield encode(picture(number % 3))

    for done, _ in enumerate(measure_images(images(), limits())):
        assert taken - done <= decoding.num_workers() * decoding.PREFETCH + 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame_up_to_a_number_of_frames(kind: str) -> None:
    frames = [picture(n) for n in range(5)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    measured = measure(data)
    assert (measured.defect, measured.num_frames, measured.passes_through) == (None, 5, False)
    first = measure(encode(frames[0]))
    assert measured.phash_64 is not None and first.phash_64 is not None
    assert (measured.phash_64 ^ first.phash_64).bit_count() <= 4
    assert measure(data, max_frames=4).defect == "image_too_many_frames"
