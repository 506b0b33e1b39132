"""Measure images in a process of its own: `python -m mllm_assets.quality.decode_worker`, spoken to by `decoding`.

Decoders are native code fed by strangers. One that loops is ended by the kernel when its CPU time is used up, and one
that crashes takes only this process with it.
"""

import os
import pickle
import signal
import struct
import sys
from typing import BinaryIO

from mllm_assets.quality.probes import DecodeLimits, measure_image

HEADER = struct.Struct("<QQ")  # bytes of the limits, bytes of the image


def main() -> None:
    """Answer requests on standard input until it ends."""
    import imagehash  # noqa: F401  # takes a third of a second, which is not the first image's

    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # what native decoders print, on either stream, is nobody's; the limits' own signal must end the process
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process by closing its input
    while (request := read_request(requests)) is not None:
        limits, data = request
        signal.setitimer(signal.ITIMER_PROF, limits.max_decode_s)
        measurement = measure_image(data, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        content = pickle.dumps(measurement.as_row())
        answers.write(HEADER.pack(len(content), 0) + content)
        answers.flush()


def read_request(stream: BinaryIO) -> tuple[DecodeLimits, bytes] | None:
    """The limits and the image of one request, None at the end."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    num_limits, num_bytes = HEADER.unpack(header)
    return DecodeLimits(**pickle.loads(stream.read(num_limits))), stream.read(num_bytes)


if __name__ == "__main__":
    main()
