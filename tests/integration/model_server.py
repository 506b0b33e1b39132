"""`mllm-assets serve` with the golden tiny model, in a process of its own, and what it is asked."""

import base64
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.integration.conftest import hear_interrupts

MODEL = Path(__file__).parents[1] / "golden" / "parity" / "model"
KEY = "a-key-that-is-long-enough"


class Server:
    """A running server; `limits` by the names of `mllm_assets.inference.connections.Limits`."""

    def __init__(self, *arguments: str, key: str | None = KEY, **limits: float) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"MLLM_ASSETS_API_KEY": key} if key else {})
        environment |= {f"MLLM_ASSETS_SERVE_{name.upper()}": str(value) for name, value in limits.items()}
        command = [sys.executable, "-m", "mllm_assets.cli", "serve", str(MODEL), "--port", "0", "--device", "cpu"]
        self.process = subprocess.Popen(
            [*command, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=hear_interrupts,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.match(r".* answers on (http://127\.0\.0\.1:\d+)/v1 as model '(.*)'; Ctrl-C ends it", line)
        assert found, line
        self.url, self.model = found.groups()

    def client(self, key: str = KEY) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=500)

    def stop(self) -> str:
        """Press Ctrl-C; returns what was printed since."""
        self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=500)[0]


def data_url(image: Path | bytes) -> str:
    data = image.read_bytes() if isinstance(image, Path) else image
    return "data:image/png;base64," + base64.b64encode(data).decode()


def question(text: str, *urls: str) -> list[Any]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
