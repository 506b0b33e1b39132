"""Measure many images on all cores, each within its limits, even if it crashes or blocks a decoder.

Decoders are native code with untrusted input, so they run in processes of this module (`python -m`). The kernel ends
one that loops when its CPU time is used up, and a crash ends only that process.
"""

import os
import pickle
import queue
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import islice

from mllm_assets.data.ingest.images import sha256
from mllm_assets.data.ingest.spec import DecodeLimits
from mllm_assets.data.quality.probes import ImageMeasurement, measure_image
from mllm_assets.errors import MachineError
from mllm_assets.plugins import load_plugins

# The limit is CPU time, which does not depend on other processes. This factor catches a decoder that waits.
WALL_FACTOR = 30
MAX_WORKERS = 8
PREFETCH = 2  # images per worker, so that memory stays bounded
# CPU seconds, which do not depend on other processes: a worker takes about half of it to start, and work that the first
# one has done by then starts no other
ALONE_S = 0.5
HEADER = struct.Struct("<QQ")  # bytes of the limits, bytes of the image; of an answer its bytes and CPU nanoseconds


def measure_images(images: Iterable[bytes], limits: DecodeLimits) -> Iterator[ImageMeasurement]:
    """Measure images in their order, in worker processes that are kept for the next call.

    An image whose decoder takes too long has the defect "image_decode_too_slow", one whose decoder crashes
    "image_decoder_crashed"; for all others see `measure_image`.

    Raises:
        MachineError: No worker can be started.
    """
    waiting = iter(images)
    num_ahead, spent_s = 1, 0.0
    with ThreadPoolExecutor(num_workers()) as pool:
        futures: queue.SimpleQueue[Future[tuple[ImageMeasurement, float]]] = queue.SimpleQueue()
        try:
            while True:
                for data in islice(waiting, num_ahead - futures.qsize()):
                    futures.put(pool.submit(_measure, data, limits))
                if futures.empty():
                    return
                measurement, cpu_s = futures.get().result()
                yield measurement
                spent_s += cpu_s
                if spent_s >= ALONE_S:
                    num_ahead = num_workers() * PREFETCH
        finally:
            while not futures.empty():
                futures.get().cancel()


def num_workers() -> int:
    """How many images are measured at once."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class _Worker:
    def __init__(self) -> None:
        command = [sys.executable, "-m", "mllm_assets.data.quality.decoding"]
        # decoding is spread over processes, so threads within one would only compete
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def measure(self, data: bytes, limits: DecodeLimits) -> tuple[ImageMeasurement, float] | None:
        """Return the measurement and the CPU seconds that it took, or None if the process ended."""
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
        num_bytes, cpu_ns = HEADER.unpack(header)
        return ImageMeasurement(**pickle.loads(self.process.stdout.read(num_bytes))), cpu_ns / 1e9

    def close(self) -> int:
        """Wait for the end of the process and return its exit code."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdout.close()
        with suppress(BrokenPipeError):  # what it no longer read
            self.process.stdin.close()
        return self.process.wait()


_idle: queue.LifoQueue[_Worker] = queue.LifoQueue()


def end_workers() -> None:
    """End the idle processes; the next call starts others."""
    while True:
        try:
            _idle.get_nowait().close()
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


def _measure(data: bytes, limits: DecodeLimits) -> tuple[ImageMeasurement, float]:
    with _borrowed() as worker:
        measured = worker.measure(data, limits)
        if measured is not None:
            return measured
        code = worker.close()
    if code > 0:
        raise MachineError(
            f"The process that decodes images cannot run (exit code {code}). Run `{sys.executable} -m "
            "mllm_assets.data.quality.decoding < /dev/null` to see why."
        )
    too_slow = code == -signal.SIGPROF
    defect = "image_decode_too_slow" if too_slow else "image_decoder_crashed"
    return ImageMeasurement(image_sha256=sha256(data), num_bytes=len(data), defect=defect), limits.max_decode_s


def _answer_requests() -> None:
    """In a worker process: measure the images on standard input until it ends."""
    load_plugins()
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # discard what native decoders print, on either stream; the time limit's signal must end the process
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process by closing its input
    while len(header := requests.read(HEADER.size)) == HEADER.size:
        num_limits, num_bytes = HEADER.unpack(header)
        limits, data = DecodeLimits(**pickle.loads(requests.read(num_limits))), requests.read(num_bytes)
        signal.setitimer(signal.ITIMER_PROF, limits.max_decode_s)
        started_ns = time.process_time_ns()
        measurement = measure_image(data, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        content = pickle.dumps(asdict(measurement))
        answers.write(HEADER.pack(len(content), time.process_time_ns() - started_ns) + content)
        answers.flush()


if __name__ == "__main__":
    _answer_requests()
