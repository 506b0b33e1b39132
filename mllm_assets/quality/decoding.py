"""Measure many images on all cores, each within its limits, whatever its bytes do to a decoder."""

import math
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice

from mllm_assets.data.images import sha256
from mllm_assets.errors import MachineError
from mllm_assets.quality.decode_worker import HEADER
from mllm_assets.quality.probes import DecodeLimits, ImageMeasurement

# The limit is of CPU time, which does not hang on what else the machine does. This one catches a decoder that waits.
WALL_FACTOR = 30
MAX_WORKERS = 8
PREFETCH = 2  # images a worker, so that memory stays bounded
ALONE_S = 0.5  # what a worker takes to start: for what the first one does in this time no other is started


def measure_images(images: Iterable[bytes], limits: DecodeLimits) -> Iterator[ImageMeasurement]:
    """Measure images in their order, in worker processes that are kept for the next call.

    An image whose decoder takes too long has the defect "image_decode_too_slow", one whose decoder crashes
    "image_decoder_crashed"; for all others see `measure_image`.

    Raises:
        MachineError: No worker can be started.
    """
    waiting = iter(images)
    num_ahead, all_start_s = 1, math.inf
    with ThreadPoolExecutor(num_workers()) as pool:
        futures: queue.SimpleQueue[Future[ImageMeasurement]] = queue.SimpleQueue()
        try:
            while True:
                for data in islice(waiting, num_ahead - futures.qsize()):
                    futures.put(pool.submit(_measure, data, limits))
                if futures.empty():
                    return
                yield futures.get().result()
                all_start_s = min(all_start_s, time.monotonic() + ALONE_S)
                if time.monotonic() >= all_start_s:
                    num_ahead = num_workers() * PREFETCH
        finally:
            while not futures.empty():
                futures.get().cancel()


def num_workers() -> int:
    """How many images are measured at once."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class _Worker:
    def __init__(self) -> None:
        command = [sys.executable, "-m", "mllm_assets.quality.decode_worker"]
        # decoding is spread over processes, so threads within one would only be in the way
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def measure(self, data: bytes, limits: DecodeLimits) -> ImageMeasurement | None:
        """Return the measurement, None if the process ended over it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        settings = pickle.dumps(asdict(limits))
        try:
            self.process.stdin.write(HEADER.pack(len(settings), len(data)) + settings)
            self.process.stdin.write(data)
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        ready, _, _ = select.select([self.process.stdout], [], [], limits.max_decode_s * WALL_FACTOR)
        if not ready:
            self.process.send_signal(signal.SIGPROF)
            return None
        header = self.process.stdout.read(HEADER.size)
        if len(header) < HEADER.size:
            return None
        return ImageMeasurement(**pickle.loads(self.process.stdout.read(HEADER.unpack(header)[0])))

    def ended_with(self) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdout.close()
        try:
            self.process.stdin.close()
        except BrokenPipeError:  # what it no longer read
            pass
        return self.process.wait()


_idle: queue.LifoQueue[_Worker] = queue.LifoQueue()


def end_workers() -> None:
    """End the processes that wait for more images; the next call starts others."""
    while True:
        try:
            _idle.get_nowait().ended_with()
        except queue.Empty:
            return


@contextmanager
def _borrowed() -> Iterator[_Worker]:
    try:
        worker = _idle.get_nowait()
    except queue.Empty:
        worker = _Worker()
    yield worker
    if worker.process.poll() is None:
        _idle.put(worker)


def _measure(data: bytes, limits: DecodeLimits) -> ImageMeasurement:
    with _borrowed() as worker:
        measurement = worker.measure(data, limits)
        if measurement is not None:
            return measurement
        code = worker.ended_with()
    if code > 0:
        raise MachineError(
            f"The process that decodes images cannot run (exit code {code}). Run `{sys.executable} -m "
            "mllm_assets.quality.decode_worker < /dev/null` to see why."
        )
    too_slow = code == -signal.SIGPROF
    defect = "image_decode_too_slow" if too_slow else "image_decoder_crashed"
    return ImageMeasurement(image_sha256=sha256(data), num_bytes=len(data), defect=defect)
