"""`<recipe>/benchmarks`: lmms-eval, in an environment of its own, asks the base and the tuned model a local task."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.conftest import EVERYTHING_PASSES, REPOSITORY, Project, wait_for
from tests.processes import processes_of

PYTHON = REPOSITORY / ".lmms-eval" / "bin" / "python"
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PYTHON.is_file(), reason="make lmms-eval makes the environment"),
]
TASK = """task: faces
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/faces/rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function faces.pictures
doc_to_text: !function faces.question
doc_to_target: answer
process_results: !function faces.scores
generation_kwargs: {max_new_tokens: 8}
metric_list:
  - {metric: right, aggregation: mean, higher_is_better: true}
  - {metric: num_chars, aggregation: mean, higher_is_better: false}
"""
CODE = """from pathlib import Path
from PIL import Image


def pictures(doc):
    return [Image.open(Path(__file__).parent / doc["image"]).convert("RGB")]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def scores(doc, results):
    return {"right": float(doc["answer"] in results[0]), "num_chars": len(results[0])}
"""


def write_task(root: Path, *, num_pictures: int = 2) -> None:
    """Two questions about each picture."""
    folder = root / "tasks" / "faces"
    folder.mkdir(parents=True)
    (folder / "faces.yaml").write_text(TASK)
    (folder / "faces.py").write_text(CODE)
    rows = []
    for image in sorted((REPOSITORY / "tests/golden/parity/data/images").glob("*.png"))[:num_pictures]:
        shutil.copy(image, folder)
        questions = ("What kind of emoji is this?", "Which one is it?")
        rows += [{"image": image.name, "question": question, "answer": "face"} for question in questions]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_both_models_are_asked_the_same_and_compared_by_picture(released: Project) -> None:
    write_task(released.root)
    benchmarks = {"tasks": ["faces"], "folder": "tasks", "python": str(PYTHON)}
    released.set_defaults(gates={**EVERYTHING_PASSES, "max_benchmark_loss": 99}, benchmarks=benchmarks)
    output = released.made('key:"mine/benchmarks" or key:"mine/eval_metrics"')
    assert "it&#95;kept&#95;its&#95;benchmarks" in released.metadata("mine", "eval_metrics")["gates"]
    metadata = released.metadata("mine", "benchmarks")
    assert metadata["num_samples"] == 4 and "faces (4)" in metadata["benchmarks"], output
    directory = released.root / metadata["path"]
    found = json.loads((directory / "benchmarks.json").read_text())["faces"]
    assert found["num_pictures"] == 2 and found["metrics"]["right"]["gain"]["num_pairs"] == 4
    rows = pq.read_table(directory / "samples.parquet").to_pylist()
    assert [row["model"] for row in rows] == ["base"] * 4 + ["tuned"] * 4
    lengths = [
        sum(len(row["answer"].strip()) for row in rows if row["model"] == model) / 4 for model in ("base", "tuned")
    ]
    of_chars = found["metrics"]["num_chars"]
    assert (of_chars["base"], of_chars["tuned"]) == tuple(map(pytest.approx, lengths))
    assert of_chars["gain"]["mean"] == pytest.approx(lengths[0] - lengths[1])  # fewer are better
    wait_for(lambda: not processes_of(released.root), "the processes of the benchmarks to end")
