"""Draw the README's picture of what `make demo` made: `python docs/hooks/hero.py [PROJECT]`, with Chromium.

One line, from pictures to a released model, drawn for 660 px: a screenshot of the graph cannot be read there.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import jinja2
from playwright.sync_api import sync_playwright

from mllm_assets.artifacts import read_manifest
from mllm_assets.data.quality.report import thumbnail
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.evaluation.gallery import rights_of
from mllm_assets.evaluation.metrics import read_metrics
from mllm_assets.evaluation.run_lookup import evaluation_of, find_run
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.layout import Layout
from mllm_assets.releases.versions import current_release
from mllm_assets.training.runs.history import TRAINER_LOG, curve, read_log, smoothed

HERE = Path(__file__).parent
PICTURE = HERE.parent / "images" / "emoji_sft_graph.png"
DATASET, RECIPE = "emoji", "emoji_sft"
PICTURE_PX = 80


def facts(layout: Layout) -> dict[str, Any]:
    """What the drawing shows, of the recipe as it is written."""
    run_dir = find_run(layout, RECIPE)
    evaluated, release = evaluation_of(layout, run_dir), current_release(layout, RECIPE)
    if evaluated is None or release is None:
        sys.exit(f"{layout.root} has no release of {RECIPE}. First: make demo")
    losses = smoothed(curve(read_log(run_dir / TRAINER_LOG), "loss"), 0.6)
    last, high = losses[-1][0], max(value for _, value in losses)
    [scored] = read_metrics(evaluated.metrics_dir)["entries"].values()
    answers = read_predictions(evaluated.predictions_dir, model="tuned")
    rights = rights_of(answers)
    first = {word: answers["images"][rights.index(word == "right")].as_py()[0] for word in ("right", "wrong")}
    rows = Dataset(layout.data).entry(f"{DATASET}_train").rows
    return {
        "pictures": [thumbnail(row.images[0], PICTURE_PX) for row in rows[:: len(rows) // 4][:4]],
        "counts": read_manifest((layout.data / DATASET).resolve()),
        "num_params_millions": read_manifest(run_dir)["num_params"] / 1e6,
        "curve": [(step / last, value / high) for step, value in losses],
        "losses": (losses[0][1], losses[-1][1]),
        "answers": [
            (thumbnail(layout.data / first[word], PICTURE_PX), word, mark)
            for word, mark in (("right", "✓"), ("wrong", "✗"))
        ],
        "accuracy": {name: values["label_accuracy"] for name, values in scored["models"].items()},
        "version": release.version,
    }


def main(project: Path) -> None:
    drawing = jinja2.Template((HERE / "hero.svg.jinja").read_text(encoding="utf-8")).render(**facts(Layout(project)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 660, "height": 366}, device_scale_factor=2)
        page.set_content(f'<body style="margin:0">{drawing}</body>')
        page.screenshot(path=str(PICTURE))
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve())
