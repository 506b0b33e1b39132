"""Every command that README and docs show is run, in a copy of the repository, in the order of the page.

A fence with a title (`sh title="needs a GPU and the Hub"`) is not; the title says to the reader why.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests.integration.conftest import IN_PROCESS

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(2400)]

REPOSITORY = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?:sh|bash)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_COPIED = shutil.ignore_patterns(
    ".venv",
    ".lmms-eval",
    ".git",
    "data",
    "pretrains",
    "outputs",
    "releases",
    "cache",
    ".dagster_home",
    "__pycache__",
    "site",
    ".*_cache",
)
# These install into .venv; the gate, and the tests of `dagster dev`, run what they run
MAKE = re.compile(r"^make (demo|test|dev|check|test-all|bench)\b")


def commands(page: str) -> list[str]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    found = []
    for info, body in FENCE.findall(text):
        if "title=" not in info:
            joined = body.replace("\\\n", " ")
            found += [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the repository in which the emoji line was made: few samples and steps, gates that anything passes."""
    root = tmp_path_factory.mktemp("docs") / "mllm_assets"
    shutil.copytree(REPOSITORY, root, ignore=_ignored)
    (root / ".venv").symlink_to(sys.prefix)
    recipe = root / "configs" / "emoji_sft.yaml"
    text = recipe.read_text().replace("max_steps: 400", "max_steps: 8").replace("steps: 100", "steps: 4")
    recipe.write_text(text.replace("train_batch_size: 16", "train_batch_size: 4"))
    defs = root / "mllm_assets" / "defs"
    (defs / "executor.py").write_text(IN_PROCESS)
    emoji = defs / "datasets" / "emoji" / "defs.yaml"
    emoji.write_text(emoji.read_text().replace("num_train: 560", "num_train: 80").replace(": 120", ": 24"))
    settings = defs / "recipes" / "defs.yaml"
    values = yaml.safe_load(settings.read_text())
    gates = {"min_loss_gain_nats": -99, "min_answer_gain": -1, "min_image_gain_nats": -99}
    values["attributes"]["defaults"] = {"gates": gates, "evaluation": {"max_samples": 16, "max_new_tokens": 8}}
    settings.write_text(yaml.safe_dump(values, sort_keys=False))
    photos = root / "photos"
    photos.mkdir()
    for index, row in enumerate(pq.read_table(root / "mllm_assets/sample_data/emoji.parquet").slice(0, 60).to_pylist()):
        (photos / f"{index}.png").write_bytes(row["image"]["bytes"])
        (photos / f"{index}.txt").write_text(row["name"], encoding="utf-8")
    (root / ".dagster_home").mkdir()
    shutil.copy(root / "dagster.yaml", root / ".dagster_home")
    done = run(root, "mllm-assets run emoji_sft")
    assert done.returncode == 0, done.stdout
    yield root


def _ignored(folder: str, names: list[str]) -> set[str]:
    """What `make demo` made at the top level; `mllm_assets/data` is a package."""
    return set(NOT_COPIED(folder, names)) if Path(folder) == REPOSITORY else {"__pycache__"} & set(names)


def run(root: Path, command: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(root),
        "DAGSTER_HOME": str(root / ".dagster_home"),
    }
    return subprocess.run(
        ["bash", "-c", command], cwd=root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_the_commands_of_a_page_do_what_it_says(clone: Path, page: str) -> None:
    for command in commands(page):
        if not MAKE.match(command):
            done = run(clone, command)
            assert done.returncode == 0, f"{page}: {command}\n{done.stdout[-3000:]}"


def test_every_make_target_in_the_docs_exists() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    named = {
        match
        for page in PAGES
        for match in re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", (REPOSITORY / page).read_text(), re.M)
    }
    for target in {first or second for first, second in named}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), (
            f"make {target} is in the docs and not in the Makefile"
        )
