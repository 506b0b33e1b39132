"""What `mllm-assets serve` takes, and whether it still answers, while many ask it and some ask badly.

    python benchmarks/serving_load.py [--keep] [--requests 200] [--abandoned 50] [--bodies 40] [--half-open 300]

The server is a process of its own with the tests' tiny model and its default limits. The loads come one after the
other: requests with a picture each, all at once; requests for 4096 tokens, half of them streamed, whose clients close
their connections at the first part of a stream or after a second, and then one more client, timed; bodies of 31 MiB, a
picture each, all at once; connections that send half of a request's head and then nothing. `/health` is asked each
100 ms by another process throughout. Memory is the server's, by its peak over what it has after a first answer.
With `--keep` (`make load`) the table takes the place of the one in RESULTS.md.
"""

import argparse
import asyncio
import base64
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import httpx
import psutil
from PIL import Image

MODEL = Path(__file__).parents[1] / "tests" / "golden" / "parity" / "model"
SMALL_PICTURE = MODEL.parent / "data" / "images" / "emoji_000.png"
RESULTS = Path(__file__).with_name("RESULTS.md")
GIB, BODY_BYTES = 2**30, 31 * 2**20
KEY = "a-key-for-this-measurement"
HEADER = "| load | answers | seconds | memory above the first answer's, GiB | slowest `/health`, s |"


class Watch:
    """The server's memory and `/health`, since the last time that one looked."""

    def __init__(self, url: str, pid: int) -> None:
        self._process, self._peak = psutil.Process(pid), 0
        self._start = self._process.memory_info().rss
        self._ours, theirs = multiprocessing.Pipe()
        self._health = multiprocessing.get_context("spawn").Process(target=ask_health, args=(url, theirs), daemon=True)
        self._health.start()
        threading.Thread(target=self._measure, daemon=True).start()

    def look(self) -> tuple[float, float]:
        """Return the most GiB above those at the start, and the slowest answer of `/health` in seconds."""
        self._ours.send(None)
        slowest_s = self._ours.recv()
        peak, self._peak = self._peak, 0
        return (peak - self._start) / GIB, slowest_s

    def _measure(self) -> None:
        while self._process.is_running():
            self._peak = max(self._peak, self._process.memory_info().rss)
            time.sleep(0.02)


def ask_health(url: str, asked: Connection) -> None:
    """Ask each 100 ms, on a connection of its own each time, and tell the slowest answer when asked for it."""
    slowest_s = 0.0
    while True:
        started = time.monotonic()
        try:
            with urlopen(f"{url}/health", timeout=120) as answer:
                assert json.load(answer) == {"status": "ok"}
            slowest_s = max(slowest_s, time.monotonic() - started)
        except OSError:  # closed without an answer
            slowest_s = math.inf
        if asked.poll(max(0.0, started + 0.1 - time.monotonic())):
            asked.recv()
            asked.send(slowest_s)
            slowest_s = 0.0


class Load:
    """The loads on one server; each returns how often which answer came."""

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        self._url, self._client = f"{url}/v1/chat/completions", client

    async def ask(self, body: bytes) -> str:
        """Send one request and return its status."""
        try:
            return str((await self._client.post(self._url, content=body)).status_code)
        except httpx.HTTPError as error:
            return type(error).__name__

    async def together(self, body: bytes, count: int) -> Counter[str]:
        return Counter(await asyncio.gather(*(self.ask(body) for _ in range(count))))

    async def abandoned(self, count: int) -> Counter[str]:
        """Leave at the first part of a stream, which half of them ask for, or after a second."""

        async def leave(stream: bool) -> str:
            body = request(SMALL_PICTURE.read_bytes(), stream=stream, max_tokens=4096, temperature=20.0)
            try:
                async with (
                    asyncio.timeout(1.0),
                    self._client.stream("POST", self._url, content=body) as answer,
                ):
                    if answer.status_code == 200:
                        await anext(answer.aiter_text())
                        return "left in the middle of a stream"
                    return str(answer.status_code)
            except TimeoutError:
                return "left while waiting"

        return Counter(await asyncio.gather(*(leave(index % 2 == 0) for index in range(count))))

    async def half_open(self, count: int) -> Counter[str]:
        """Wait until the server closes them, for a minute at most."""
        url = httpx.URL(self._url)

        async def stay() -> str:
            reader, writer = await asyncio.open_connection(url.host, url.port)
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Half: ")
            try:
                async with asyncio.timeout(60):
                    await reader.read()
                return "closed by the server"
            except ConnectionError:
                return "closed by the server"
            except TimeoutError:
                return "open after a minute"
            finally:
                writer.close()

        return Counter(await asyncio.gather(*(stay() for _ in range(count))))


def request(picture: bytes, **options: Any) -> bytes:
    """The body of a request about a picture."""
    address = {"url": "data:image/png;base64," + base64.b64encode(picture).decode()}
    parts = [{"type": "image_url", "image_url": address}, {"type": "text", "text": "What is this?"}]
    return json.dumps({"messages": [{"role": "user", "content": parts}], "max_tokens": 16, **options}).encode()


def large_picture() -> bytes:
    """A PNG of as many bytes as fit into a body of 31 MiB, of noise, which does not compress."""
    side = int((BODY_BYTES * 3 / 4 / 3) ** 0.5) - 8
    buffer = BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(side * side * 3)).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def start_server() -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "mllm_assets.cli", "serve", str(MODEL), "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "MLLM_ASSETS_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "4096"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"answers on (http://\S+)/v1 ", line)
    assert found, line
    return process, found[1]


async def run(arguments: argparse.Namespace, url: str, pid: int) -> list[str]:
    """Put the loads on the server; print and return the table's lines."""
    lines = [HEADER, "|---|---|---|---|---|"]
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(headers=headers, limits=unlimited, timeout=600) as client:
        load = Load(url, client)
        small, large = request(SMALL_PICTURE.read_bytes()), request(large_picture())
        assert await load.ask(small) == "200"
        watch = Watch(url, pid)
        await asyncio.sleep(1)
        watch.look()

        async def measured(name: str, action: Callable[[], Awaitable[Counter[str]]]) -> None:
            started = time.monotonic()
            answers = await action()
            time_s = time.monotonic() - started
            memory, slowest_s = await asyncio.to_thread(watch.look)
            told = ", ".join(f"{count} {answer}" for answer, count in sorted(answers.items()))
            lines.append(f"| {name} | {told} | {time_s:.1f} | {memory:.2f} | {slowest_s:.2f} |")
            print(lines[-1], flush=True)

        print(*lines, sep="\n")
        await measured(
            f"{arguments.requests} requests with a picture", lambda: load.together(small, arguments.requests)
        )
        await measured(f"{arguments.abandoned} abandoned", lambda: load.abandoned(arguments.abandoned))
        await measured("the next client after them", lambda: load.together(small, 1))
        await measured(f"{arguments.bodies} bodies of 31 MiB", lambda: load.together(large, arguments.bodies))
        await measured(f"{arguments.half_open} half-open connections", lambda: load.half_open(arguments.half_open))
        await measured("one more client", lambda: load.together(small, 1))
    return lines


def keep(lines: list[str]) -> None:
    """Put a table in the place of the one in RESULTS.md."""
    text = RESULTS.read_text(encoding="utf-8")
    start = text.index(HEADER)
    end = text.index("\n\n", start)
    RESULTS.write_text(text[:start] + "\n".join(lines) + text[end:], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("requests", 200), ("abandoned", 50), ("bodies", 40), ("half-open", 300)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keep", action="store_true", help="put the table into RESULTS.md")
    arguments = parser.parse_args()
    process, url = start_server()
    try:
        lines = asyncio.run(run(arguments, url, process.pid))
        if arguments.keep:
            keep(lines)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
