"""Base and tuned model are compared in pairs on what both were asked; lmms-eval is looked for before anything loads."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mllm_assets.artifacts import write_json_atomic, write_manifest
from mllm_assets.errors import IntegrityError, MachineError, RecipeError
from mllm_assets.evaluation.benchmarks import (
    FIGURES,
    SAMPLES,
    compare_benchmarks,
    folder_digest,
    publish_benchmarks,
    to_table,
)
from mllm_assets.evaluation.gates import KEEPS, GateResult, GateSpec, evaluate_gates
from mllm_assets.evaluation.lmms_eval import Asking, find_lmms_eval, variables
from mllm_assets.evaluation.lmms_results import Sample
from mllm_assets.evaluation.metrics import compute_metrics
from mllm_assets.layout import Layout
from mllm_assets.worker.benchmark_task import BenchmarkSettings
from tests.unit.evaluation.made_predictions import predictions


def samples(right: Sequence[float], *, questions_a_picture: int = 1) -> list[Sample]:
    return [
        Sample(
            task="faces", doc_id=index, question=f"{index}?", target="face", answer="a",
            scores={"right": value, "num_chars": 10 - 4 * value}, pictures=f"p{index // questions_a_picture}",
        )
        for index, value in enumerate(right)
    ]  # fmt: skip


def asked(directory: Path, rows: list[Sample], **lineage: Any) -> Path:
    """What a worker leaves of one model."""
    directory.mkdir()
    pq.write_table(to_table(rows), directory / SAMPLES)
    means = {name: sum(row.scores[name] for row in rows) / len(rows) for name in ("right", "num_chars")}
    figures = {"figures": {"faces": {**means, "overall": 0.5}}, "higher_is_better": {"faces": {"num_chars": False}}}
    write_json_atomic(directory / FIGURES, figures)
    write_manifest(directory, {"lineage": lineage})
    return directory


def test_gains_are_paired_and_have_the_direction_of_the_metric(tmp_path: Path) -> None:
    base = asked(tmp_path / "base", samples([0, 0, 0, 1]))
    tuned = asked(tmp_path / "tuned", samples([1, 1, 0, 1]))
    found = compare_benchmarks(base, tuned)["faces"]
    assert found["num_samples"] == found["num_pictures"] == 4
    right, chars = found["metrics"]["right"], found["metrics"]["num_chars"]
    assert (right["base"], right["tuned"], right["gain"]["mean"]) == (0.25, 0.75, 0.5)
    assert chars["gain"]["mean"] == 2.0, "fewer characters are better"
    assert found["metrics"]["overall"]["gain"] is None, "a score of all answers together has no pairs"


def test_questions_about_one_picture_are_not_independent(tmp_path: Path) -> None:
    right = [0, 0, 0, 0, 1, 1, 1, 1] * 4
    widths = []
    for number in (1, 4):
        base = asked(tmp_path / f"base{number}", samples([0] * 32, questions_a_picture=number))
        tuned = asked(tmp_path / f"tuned{number}", samples(right, questions_a_picture=number))
        gain = compare_benchmarks(base, tuned)["faces"]["metrics"]["right"]["gain"]
        widths.append(gain["high"] - gain["low"])
    assert widths[1] > 1.5 * widths[0]


def test_models_that_were_asked_other_things_are_not_compared(tmp_path: Path) -> None:
    rows = samples([0, 1])
    base = asked(tmp_path / "base", rows)
    others = {
        "fewer": rows[:1],
        "question": [rows[0], replace(rows[1], question="another?")],
        "picture": [rows[0], replace(rows[1], pictures="another")],
    }
    for name, other in others.items():
        with pytest.raises(IntegrityError, match="not asked the same"):
            compare_benchmarks(base, asked(tmp_path / name, other))
    compare_benchmarks(base, asked(tmp_path / "unknown", [replace(row, pictures=None) for row in rows]))


def test_what_was_compared_is_published_once_with_both_models_samples(tmp_path: Path) -> None:
    base, tuned = asked(tmp_path / "base", samples([0, 0]), model="b"), asked(tmp_path / "tuned", samples([1, 0]))
    made = publish_benchmarks(Layout(tmp_path), "mine", base, tuned)
    assert made == publish_benchmarks(Layout(tmp_path), "mine", base, tuned)
    assert "| faces (2) | right | 0 | 0.5 | +0.5 (0 to 1) |" in made.markdown()
    rows = pq.read_table(made.directory / SAMPLES).to_pylist()
    assert [(row["model"], row["doc_id"]) for row in rows] == [("base", 0), ("base", 1), ("tuned", 0), ("tuned", 1)]


def test_a_metric_that_fell_by_more_than_noise_and_than_is_allowed_fails_the_gate(tmp_path: Path) -> None:
    def judged(before: Sequence[float], after: Sequence[float], allowed: float | None) -> GateResult | None:
        number = len(list(tmp_path.iterdir()))
        base, tuned = asked(tmp_path / f"b{number}", samples(before)), asked(tmp_path / f"t{number}", samples(after))
        metrics = compute_metrics(predictions(), ["cat"]) | {"benchmarks": compare_benchmarks(base, tuned)}
        results = evaluate_gates(metrics, GateSpec(max_benchmark_loss=allowed))
        return next((result for result in results if result.name == KEEPS), None)

    worse = judged([1] * 20, [0] * 19 + [1], 0.1)
    assert (
        worse and not worse.passed and worse.description.startswith("faces, num_chars: the worsening of a score over")
    )
    for fell, allowed in (([0, 1] * 10, 4), ([0] + [1] * 19, 0.1), ([1] * 20, 0)):
        passed = judged([1] * 20, fell, allowed)
        assert passed and passed.passed, passed
    assert judged([1] * 20, [0] * 20, None) is None


def test_a_threshold_without_benchmarks_stops_the_release() -> None:
    results = evaluate_gates(compute_metrics(predictions(), ["cat"]), GateSpec(max_benchmark_loss=0.1))
    [gate] = [result for result in results if result.name == KEEPS]
    assert not gate.passed and "set benchmarks" in gate.description


def test_a_folder_of_tasks_is_named_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("task: a")
    first = folder_digest(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").touch()
    (tmp_path / ".a.yaml.swp").touch()
    assert folder_digest(tmp_path) == first
    (tmp_path / "a.yaml").write_text("task: b")
    assert folder_digest(tmp_path) != first


@pytest.mark.parametrize(
    "wrong",
    [
        {"tasks": ()},
        {"tasks": ("--include_path",)},
        {"tasks": ("a,b",)},
        {"tasks": ("../faces",)},
        {"tasks": ("faces\n",)},
        {"tasks": ("faces", "faces")},
        {"tasks": ("faces",), "limit": 0},
        {"tasks": ("faces",), "folder": "../tasks"},
        {"tasks": ("faces",), "folder": "/tasks"},
        {"tasks": ("faces",), "max_new_tokens": 0},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="benchmarks: "):
        BenchmarkSettings(**wrong)


def test_a_missing_environment_is_told_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(
        MachineError, match=r"python -m venv \S+/\.lmms-eval && \S+/bin/pip install lmms-eval==0\.7\.3 'filelock<4\.3'"
    ):
        find_lmms_eval(tmp_path, BenchmarkSettings(tasks=("faces",)).python)
    own = rf"has no lmms-eval.* python -m venv {re.escape(str(tmp_path))}/\.lmms-eval && .*delete `python` of the"
    with pytest.raises(MachineError, match=own):  # into sys.executable's it would put other versions
        find_lmms_eval(tmp_path, sys.executable)
    broken = tmp_path / "python"
    broken.write_text("nothing")
    with pytest.raises(MachineError, match="does not run"):
        find_lmms_eval(tmp_path, "python")


def test_lmms_eval_gets_no_secret_but_the_hubs_and_is_offline_unless_it_may_download(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MLLM_ASSETS_API_KEY", "PYTHONPATH"):
        monkeypatch.setenv(name, "a-value-that-nobody-knows")
    monkeypatch.setenv("NO_PROXY", "intranet")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    asking = Asking(address="http://127.0.0.1:1", api_key="of-this-server", model="base")
    offline, online = variables(asking, download=False), variables(asking, download=True)
    assert "a-value-that-nobody-knows" not in offline.values()
    assert [name for name, value in online.items() if value == "a-value-that-nobody-knows"] == ["HF_TOKEN"]
    assert offline["OPENAI_API_KEY"] == "of-this-server" and offline["NO_PROXY"] == "intranet,127.0.0.1"
    assert offline["HF_HUB_OFFLINE"] == "1" and "HF_HUB_OFFLINE" not in online
    assert offline["PATH"] == os.environ["PATH"]
