"""A page of a real browser."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.integration.conftest import hear_interrupts
from tests.ports import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
ENDS_S = 300
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """With SCREENSHOTS=folder in the environment, what it showed last is kept there as a picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(400_000)
        expect.set_options(timeout=400_000)
        yield page
        if folder := os.environ.get("SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=str(Path(folder) / f"{tmp_path.name}.png"))
        browser.close()


@contextmanager
def serving(verb: str, *arguments: str, cwd: Path, env: Mapping[str, str]) -> Iterator[str]:
    """The address of a page that a verb of `mllm-assets` serves; Ctrl-C ends it with the block."""
    port = free_port()
    command = [sys.executable, "-m", "mllm_assets.cli", verb, *arguments, "--device", "cpu", "--port", str(port)]
    with subprocess.Popen(
        command, env=dict(env), cwd=cwd, stdout=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"the page is on http://127.0.0.1:{port}; Ctrl-C ends it\n"
            yield f"http://127.0.0.1:{port}"
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=ENDS_S)
            assert process.returncode == 0
        finally:
            process.kill()
