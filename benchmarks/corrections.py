"""What one round of corrections gains: `python benchmarks/corrections.py [SEED ...]`.

The project of `label_issues.py`, with more test rows, whose labels are all true. A person looks at the first 36 of the
450 training rows, gives those that are wrong their true name and keeps the others; then `<recipe>/what_it_gained`
trains the recipe with and without these decisions, and asks both models about the same test rows.
"""

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from label_issues import NUM_TRAIN, SHARE_WRONG, command, draw_all

from mllm_assets.data.quality.store import QualityStore

NUM_TEST = 400
VALUES = {"report_to": "none", "plot_loss": False}
NUM_REVIEWED = round(SHARE_WRONG * NUM_TRAIN)


def prepared(project: Path, seed: int) -> dict[str, str]:
    """A project with ranked rows; returns the true names of the wrong ones, by location."""
    subprocess.run([sys.executable, "-m", "mllm_assets.cli", "init", str(project)], check=True, stdout=2)
    wrong = draw_all(project / "shapes", seed, num_test=NUM_TEST)
    command(project, "add-dataset", "shapes")
    [settings] = project.glob("*/defs/datasets/shapes/defs.yaml")
    settings.write_text(settings.read_text() + "  label_issues:\n    recipe: shapes_sft\n")
    recipe: dict[str, Any] = yaml.safe_load(
        (project / "configs" / "emoji_sft.yaml").read_text().replace("emoji_", "shapes_")
    )
    (project / "configs" / "shapes_sft.yaml").write_text(yaml.safe_dump(recipe | VALUES, sort_keys=False))
    [settings] = project.glob("*/defs/recipes/defs.yaml")
    component = yaml.safe_load(settings.read_text())
    component["attributes"].setdefault("settings", []).append({"recipe": "shapes_sft", "what_it_gained": True})
    settings.write_text(yaml.safe_dump(component))
    command(project, "run", "shapes/label_issues")
    return wrong


def review(project: Path, wrong: dict[str, str]) -> int:
    """Decide about the first rows; returns how many were wrong."""
    [ranking] = project.glob("outputs/shapes_sft/label_issues/*/issues.json")
    store = QualityStore(project / "data" / "quality.duckdb")
    rows = store.query("SELECT sample_id, source_location FROM latest_verdicts")
    places = {row["sample_id"]: row["source_location"] for row in rows}
    by_name: dict[str, list[str]] = defaultdict(list)
    for issue in json.loads(ranking.read_text())[:NUM_REVIEWED]:
        by_name[wrong.get(places[issue["sample_id"]], "")].append(issue["sample_id"])
    for name, ids in by_name.items():
        command(project, "review", "shapes", *(["relabel", *ids, "--to", name] if name else ["keep", *ids]))
    return NUM_REVIEWED - len(by_name[""])


def main() -> None:
    for seed in [int(text) for text in sys.argv[1:]] or [0]:
        with tempfile.TemporaryDirectory() as folder:
            project = Path(folder, "trial")
            num_corrected = review(project, prepared(project, seed))
            command(project, "run", "shapes_sft/what_it_gained")
            [found] = project.glob("outputs/shapes_sft/what_it_gained/*/what_it_gained.json")
            [scored] = json.loads(found.read_text()).values()
        print(f"seed {seed}: {num_corrected} of {NUM_REVIEWED} reviewed rows corrected; {scored['num_samples']} tested")
        for metric in ("label_accuracy", "loss"):
            one = scored["metrics"][metric]
            print(f"  {metric}: without {one['without']:.4g}, with {one['with']:.4g}, gain {one['shown']}", flush=True)


if __name__ == "__main__":
    main()
