"""How well `<dataset>/label_issues` finds planted wrong labels: `python benchmarks/label_issues.py [SEED] [--colored]`.

450 drawn shapes to train on, of which 36 (8 %) get a wrong name, in a project of its own with the tiny model, whose
tower is random. Needs the extra `labels`. With `--captions` each has a caption, "a blue star on grey paper", and the
wrong ones have another picture's, which is ranked by the loss of models that did not see it: 3 folds of 100 steps of 8.
"""

import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

from mllm_assets.data.quality.store import QualityStore

KINDS = ("circle", "square", "triangle", "star", "cross")
NUM_TRAIN, NUM_VAL, NUM_TEST, SHARE_WRONG = 450, 60, 60, 0.08
SIZE_PX = 64
Color = tuple[int, ...]
INKS: dict[str, Color] = {
    "red": (200, 30, 30), "green": (20, 130, 40), "blue": (30, 50, 200), "black": (20, 20, 20), "brown": (110, 60, 20),
    "purple": (120, 30, 150),
}  # fmt: skip
PAPERS: dict[str, Color] = {"white": (255, 255, 255), "grey": (190, 190, 190), "yellow": (250, 240, 150)}


def draw_any(kind: str, rng: random.Random, *, colored: bool = False) -> Image.Image:
    """One shape in dark ink on white paper, or of any dark colour on any light ground."""
    ground, ink = ((200, 256), (0, 100)) if colored else ((245, 256), (0, 30))
    paper, color = (tuple(rng.randrange(*ends) for _ in range(3)) for ends in (ground, ink))
    return draw(kind, rng, paper, color)


def draw(kind: str, rng: random.Random, paper: Color, color: Color) -> Image.Image:
    """One shape somewhere, of some size."""
    image, radius = Image.new("RGB", (SIZE_PX, SIZE_PX), paper), rng.uniform(18, 28)
    pen = ImageDraw.Draw(image)
    x, y = (rng.uniform(radius + 2, SIZE_PX - 2 - radius) for _ in range(2))
    box = (x - radius, y - radius, x + radius, y + radius)
    if kind == "circle":
        pen.ellipse(box, fill=color)
    elif kind == "square":
        side = 0.85 * radius
        pen.rectangle((x - side, y - side, x + side, y + side), fill=color)
    elif kind == "cross":
        arm = radius / 4
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=color)
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=color)
    else:
        corners, inner = (3, 1.0) if kind == "triangle" else (10, 0.4)
        lengths = [radius * (inner if corner % 2 else 1.0) for corner in range(corners)]
        turns = [2 * math.pi * corner / corners for corner in range(corners)]
        pen.polygon(
            [(x + r * math.sin(a), y - r * math.cos(a)) for r, a in zip(lengths, turns, strict=True)], fill=color
        )
    return image


def draw_all(folder: Path, seed: int, *, colored: bool = False, num_test: int = NUM_TEST) -> dict[str, str]:
    """Write the pictures as `<split>/<name>/<number>.png`; returns the true names of the wrong ones, by location."""
    rng, wrong = random.Random(seed), {}
    for split, number in (("train", NUM_TRAIN), ("val", NUM_VAL), ("test", num_test)):
        planted = set(rng.sample(range(number), round(SHARE_WRONG * number)) if split == "train" else ())
        for index in range(number):
            kind = KINDS[index % len(KINDS)]
            said = rng.choice([other for other in KINDS if other != kind]) if index in planted else kind
            path = folder / split / said / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_any(kind, rng, colored=colored).save(path)
            if said != kind:
                wrong[path.relative_to(folder).as_posix()] = kind
    return wrong


def draw_captioned(folder: Path, seed: int) -> dict[str, str]:
    """Write the pictures as `<split>/<number>.png` with a text each; returns the true captions of the wrong ones."""
    rng, wrong = random.Random(seed), {}
    for split, number in (("train", NUM_TRAIN), ("val", NUM_VAL), ("test", NUM_TEST)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        true = []
        for index in range(number):
            kind, ink, paper = KINDS[index % len(KINDS)], rng.choice([*INKS]), rng.choice([*PAPERS])
            draw(kind, rng, PAPERS[paper], INKS[ink]).save(folder / split / f"{index:04d}.png")
            true.append(f"a {ink} {kind} on {paper} paper")
        said = list(true)
        for index in rng.sample(range(number), round(SHARE_WRONG * number)) if split == "train" else ():
            said[index] = rng.choice([text for text in true if text != true[index]])
            wrong[f"{split}/{index:04d}.png"] = true[index]
        for index, text in enumerate(said):
            (folder / split / f"{index:04d}.txt").write_text(text)
    return wrong


def command(project: Path, *arguments: str) -> None:
    """Run one `mllm-assets` command in a project."""
    environment = {**os.environ, "DAGSTER_HOME": str(project / ".dagster_home"), "MLLM_ASSETS_ROOT": str(project)}
    subprocess.run(
        [sys.executable, "-m", "mllm_assets.cli", *arguments], cwd=project, env=environment, check=True, stdout=2
    )


def main() -> None:
    captions = "--captions" in sys.argv
    colored, seed = "--colored" in sys.argv, int(([text for text in sys.argv[1:] if text.isdigit()] or ["0"])[0])
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder, "trial")
        subprocess.run([sys.executable, "-m", "mllm_assets.cli", "init", str(project)], check=True, stdout=2)
        shapes = project / "shapes"
        wrong = draw_captioned(shapes, seed) if captions else draw_all(shapes, seed, colored=colored)
        command(project, "add-dataset", "shapes")
        [settings] = project.glob("*/defs/datasets/shapes/defs.yaml")
        folds = "    num_folds: 3\n    max_steps: 100\n" if captions else ""
        settings.write_text(settings.read_text() + "  label_issues:\n    recipe: shapes_sft\n" + folds)
        recipe = (project / "configs" / "emoji_sft.yaml").read_text().replace("emoji_", "shapes_")
        if captions:
            recipe = recipe.replace("per_device_train_batch_size: 16", "per_device_train_batch_size: 8")
        (project / "configs" / "shapes_sft.yaml").write_text(recipe)
        command(project, "run", "shapes/label_issues")
        [ranking] = project.glob("outputs/shapes_sft/label_issues/*/issues.json")
        rows = QualityStore(project / "data" / "quality.duckdb").query(
            "SELECT sample_id, source_location FROM latest_verdicts"
        )
        places = {row["sample_id"]: row["source_location"] for row in rows}
        issues = json.loads(ranking.read_text())
    found = [places[issue["sample_id"]] in wrong for issue in issues]
    suspects = [is_wrong for is_wrong, issue in zip(found, issues, strict=True) if issue["is_suspect"]]
    what = ", colored" if colored else ", captions" if captions else ""
    print(
        f"seed {seed}{what}: {len(wrong)} wrong; precision among the first {len(wrong)}: "
        f"{sum(found[: len(wrong)]) / len(wrong):.3f}; "
        f"{len(suspects)} suspects, {sum(suspects)} of them wrong"
    )


if __name__ == "__main__":
    main()
