"""Pictures of all that a person sees, at two widths: `python -m tests.e2e.screens [dagster] [board] [files]`.

Run where `make demo` was made: it opens that project's Dagster, its board, and its reports and documentation, and makes
nothing but pictures, in build/screens. They are for eyes: what must hold is in the tests beside this file.
"""

import argparse
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Error, Page, sync_playwright

from tests.e2e.conftest import CHROMIUM, FLAGS, serving
from tests.integration.conftest import hear_interrupts
from tests.ports import free_port

REPOSITORY = Path(__file__).parents[2]
RECIPE, DATASET = "emoji_sft", "emoji"
WIDTHS_PX = (1440, 1280)
HEIGHT_PX = 1600  # an asset's page scrolls inside, so that a picture of the "full page" is cut too
PATIENCE_MS = 60_000
ASSETS = (
    *(f"{DATASET}/{name}" for name in ("raw", "sample_quality", "train", "dataset_info")),
    "pretrained/gemma3_tiny",
    *(f"{RECIPE}/{name}" for name in ("checkpoint", "predictions", "eval_metrics", "released_model")),
)
TABS = ("Samples", "Review", "Runs", "Gallery", "Approve", "Chat", "Start")


@dataclass(frozen=True, kw_only=True, slots=True)
class Screen:
    """A picture's name, where it is, and what is done there before it is taken."""

    name: str
    address: str
    prepare: Callable[[Page], object] = lambda page: None


def dagster_screens(url: str) -> Iterator[Screen]:
    """The graph, each asset, the launchpad, the lists and the newest run."""
    groups = ",".join(f"global@global:{group}" for group in (DATASET, "pretrained", RECIPE))
    line = f"%2Bkey%3A%22{RECIPE}%2Freleased_model%22"
    yield Screen(name="graph", address=f"{url}/asset-groups/")
    yield Screen(name="graph_line", address=f"{url}/asset-groups~{line}/?expanded={groups.replace('@', '%40')}")
    for key in ASSETS:
        yield Screen(name=f"asset_{key.replace('/', '_')}", address=f"{url}/assets/{key}", prepare=shows("cost_wall_s"))
    for name, key, metadata in (
        ("curve", "checkpoint", "training_loss"),
        ("pairs", "predictions", "gallery"),
        ("metrics", "eval_metrics", "metrics"),
    ):
        address = f"{url}/assets/{RECIPE}/{key}"
        yield Screen(name=f"window_{name}", address=address, prepare=opens(metadata))
    yield Screen(
        name="checks",
        address=f"{url}/assets/{RECIPE}/eval_metrics?view=checks",
        prepare=shows("beats_most_common_answer"),
    )
    yield Screen(name="launchpad", address=f"{url}/assets/{RECIPE}/checkpoint", prepare=open_launchpad)
    for name in ("jobs", "runs"):
        yield Screen(name=name, address=f"{url}/{name}")
    yield Screen(name="run", address=f"{url}/runs", prepare=open_newest_run)


def board_screens(url: str) -> Iterator[Screen]:
    """Each tab."""

    def opens_tab(name: str) -> Callable[[Page], object]:
        return lambda page: page.get_by_role("tab", name=name, exact=True).click()

    for name in TABS:
        yield Screen(name=f"board_{name.lower()}", address=url, prepare=opens_tab(name))

    def estimate(page: Page) -> None:
        opens_tab("Start")(page)
        page.get_by_text("model_name_or_path").first.wait_for()  # the draft is there
        page.get_by_role("button", name="Estimate and show rows").click()
        page.locator(".board-look").scroll_into_view_if_needed()

    yield Screen(name="board_start_estimate", address=url, prepare=estimate)


def file_screens(project: Path, site: Path) -> Iterator[Screen]:
    """Pages that are opened from the disk, the documentation among them."""
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q", "-d", site.absolute()], cwd=REPOSITORY, check=True)
    pages = {
        "report": project / "data" / DATASET / "report.html",
        "quality": next(project.glob(f"data/.quality/{DATASET}/*/report.html"), None),
        "gallery": next(project.glob(f"outputs/{RECIPE}/predictions/*/gallery.html"), None),
        "docs_home": site / "index.html",
        "docs_board": site / "board" / "index.html",
    }
    for name, path in pages.items():
        if path and path.is_file():
            yield Screen(name=name, address=path.absolute().as_uri())


def shows(text: str) -> Callable[[Page], object]:
    return lambda page: page.get_by_text(text, exact=True).first.wait_for()


def opens(key: str) -> Callable[[Page], object]:
    """Open the window of a piece of metadata."""

    def prepare(page: Page) -> None:
        page.locator("tr", has=page.get_by_text(key, exact=True)).get_by_text("Show Markdown").first.click()
        page.get_by_role("dialog").wait_for()

    return prepare


def open_launchpad(page: Page) -> None:
    page.get_by_role("button", name="Materialize").first.click(modifiers=["Shift"])
    page.locator(".CodeMirror").first.wait_for()


def open_newest_run(page: Page) -> None:
    page.locator('a[href^="/runs/"]').first.click()
    page.get_by_text("RUN_SUCCESS").first.wait_for()


@contextmanager
def dagster_dev(project: Path) -> Iterator[str]:
    port, path = free_port(), os.pathsep.join([str(project), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "DAGSTER_HOME": str(project.absolute() / ".dagster_home"), "PYTHONPATH": path}
    command = [sys.executable, "-m", "dagster", "dev", "-h", "127.0.0.1", "-p", str(port)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        command, cwd=project, env=environment, stdout=quiet, stderr=quiet, preexec_fn=hear_interrupts
    ) as process:
        try:
            while process.poll() is None:
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/server_info", timeout=5):
                    break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def take(page: Page, screen: Screen, into: Path) -> None:
    """Open, prepare, wait until nothing loads, and take the picture at each width; what failed is said, not hidden."""
    failed = ""
    for width_px in WIDTHS_PX:
        page.set_viewport_size({"width": width_px, "height": HEIGHT_PX})
        try:
            page.goto(screen.address)
            screen.prepare(page)
        except Error as error:
            failed = f"  not as it should be: {str(error).splitlines()[0]}"
        with suppress(Error):  # pages that poll are never idle
            page.wait_for_load_state("networkidle", timeout=5_000)
        page.wait_for_timeout(1_500)  # pictures fade in
        page.screenshot(path=str(into / f"{screen.name}_{width_px}.png"))
    print(f"{screen.name}{failed}", flush=True)


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["dagster", "board", "files"])
    parser.add_argument("--into", type=Path, default=Path("build/screens"))
    arguments = parser.parse_args()
    into, project = arguments.into, Path.cwd()
    into.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        screens = {
            "dagster": lambda: dagster_screens(stack.enter_context(dagster_dev(project))),
            "board": lambda: board_screens(stack.enter_context(serving("board", cwd=project, env=os.environ))),
            "files": lambda: file_screens(project, into / "site"),
        }
        for part in arguments.parts:
            for screen in screens[part]():
                take(page, screen, into)
        browser.close()


if __name__ == "__main__":
    main()
