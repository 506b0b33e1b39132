"""`mllm-assets evaluate` scores a run's checkpoints; `mllm-assets compare` puts two runs on one page."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mllm_assets.artifacts import read_manifest
from mllm_assets.cli import main
from mllm_assets.evaluation.metrics import compute_metrics, write_metrics
from mllm_assets.evaluation.predict import evaluate_task
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.layout import Layout
from mllm_assets.training.engine import train_task
from mllm_assets.training.model_directory import model_fingerprint
from mllm_assets.training.protocol import Reporter
from mllm_assets.training.spec import TrainSpec

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ACCELERATOR = {"device": "cpu", "num_threads": 1}


@pytest.fixture(scope="module")
def root(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two runs of six steps, one of which learns more; each with its evaluation."""
    root = tmp_path_factory.mktemp("project")
    layout = Layout(root)
    shutil.copytree(parity_dir / "data", root / "data")
    shutil.copytree(parity_dir / "model", root / "pretrains" / "model")
    model = str(root / "pretrains" / "model")
    for name, learning_rate in (("slowly", 1e-5), ("quickly", 3e-3)):
        run_dir = layout.outputs / name / "0123456789abcdef"
        recipe = TrainSpec(
            model_name_or_path="pretrains/model", dataset="gemma3_vlm_train", eval_dataset="gemma3_vlm_val",
            template="gemma3", do_train=True, finetuning_type="full", freeze_multi_modal_projector=False,
            learning_rate=learning_rate, max_steps=6, save_steps=2, logging_steps=1, eval_strategy="steps",
            eval_steps=3,
        )  # fmt: skip
        run = train_task(
            {
                "recipe": recipe.to_dict(), "model_dir": model, "data_dir": str(layout.data), "run_dir": str(run_dir),
                "fingerprint": "f", "pretrained_fingerprint": model_fingerprint(Path(model)),
                "accelerator": ACCELERATOR,
            },
            Reporter(),
        )  # fmt: skip
        (run_dir.parent / "latest").symlink_to(run_dir.name)
        said = layout.predictions(name, "p")
        evaluate_task(
            {
                "recipe_name": name, "model_dir": str(run_dir / "model"), "base_model_dir": model,
                "data_dir": str(layout.data), "entries": ["gemma3_vlm_val"], "directory": str(said),
                "max_new_tokens": 4, "accelerator": ACCELERATOR,
            },
            Reporter(),
        )  # fmt: skip
        inputs = {"weights_digest": run["weights_digest"], "predictions_path": layout.relative(said)}
        write_metrics(layout.metrics(name, "m"), compute_metrics(read_predictions(said), ["a"]), inputs)
    return root


def said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, root: Path, *arguments: str
) -> tuple[int, Any]:
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(root))
    return main(list(arguments)), capsys.readouterr()


def test_every_checkpoint_is_scored_drawn_and_the_best_is_named(root: Path, capsys, monkeypatch) -> None:
    options = ("--device", "cpu", "--max-new-tokens", "4")
    code, output = said(capsys, monkeypatch, root, "evaluate", "quickly", "--json", *options)
    assert code == 0, output.err
    result = json.loads(output.out)
    losses = {step: scored["gemma3_vlm_val"]["loss"] for step, scored in result["steps"].items()}
    assert list(losses) == ["2", "4", "6"] and len(set(losses.values())) == 3
    assert result["best"]["gemma3_vlm_val"]["loss"] == int(min(losses, key=lambda step: losses[step]))
    run_dir = root / "outputs" / "quickly" / "latest"
    assert (run_dir / "checkpoint_metrics.png").read_bytes().startswith(b"\x89PNG")
    last = read_predictions(root / "outputs" / "quickly" / "predictions" / "p").to_pylist()
    tokens = [(row["loss_nats"], row["num_supervised_tokens"]) for row in last if row["model"] == "tuned"]
    finished = sum(loss * num for loss, num in tokens) / sum(num for _, num in tokens)
    assert losses["6"] == pytest.approx(finished, abs=1e-6), "the last checkpoint is the finished model"

    before = (root / "outputs" / "quickly" / "predictions").stat().st_mtime_ns
    code, output = said(capsys, monkeypatch, root, "evaluate", str(run_dir), "--checkpoint", "4", *options)
    assert code == 0 and "best: step 4 by loss" in output.out
    assert (root / "outputs" / "quickly" / "predictions").stat().st_mtime_ns == before, "it was asked before"


def test_what_cannot_be_evaluated_is_named(root: Path, capsys, monkeypatch) -> None:
    code, output = said(capsys, monkeypatch, root, "evaluate", "quickly", "--checkpoint", "5")
    assert code == 2 and "has no complete checkpoint '5'; it has: 2, 4, 6." in output.err
    code, output = said(capsys, monkeypatch, root, "evaluate", "nothing")
    assert code == 2 and "nothing is neither the directory of a training run nor a recipe" in output.err


def test_two_runs_are_compared_on_one_page_that_needs_no_other_file(
    root: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    page = tmp_path / "page.html"
    code, output = said(capsys, monkeypatch, root, "compare", "slowly", "quickly", "--output", str(page))
    assert code == 0, output.err
    html = page.read_text()
    assert html.count("<article") == 8 and "slowly and quickly" in html
    assert re.findall(r'(?:src|href)="(?!data:image/)', html) == [] and "http" not in html
    metrics = [
        json.loads((root / "outputs" / name / "eval_metrics" / "m" / "eval_metrics.json").read_text())
        for name in ("slowly", "quickly")
    ]
    for some in metrics:
        assert f"{some['entries']['gemma3_vlm_val']['models']['tuned']['loss']:.4f}" in html
    gains = [float(gain) for gain in re.findall(r'data-gain="(.*?)"', html)]
    assert gains == sorted(gains, key=abs, reverse=True)


def test_a_run_without_metrics_is_not_compared(root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    copy = tmp_path / "outputs" / "other" / "run"
    shutil.copytree(root / "outputs" / "slowly" / "0123456789abcdef", copy)
    assert read_manifest(copy)
    code, output = said(capsys, monkeypatch, root, "compare", "slowly", str(copy))
    assert code == 2 and "was not evaluated: there are no metrics of" in output.err
