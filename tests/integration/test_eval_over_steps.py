"""`mllm-assets evaluate` scores a run's checkpoints; `mllm-assets compare` puts two runs on one page."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from mllm_assets.artifacts import point_symlink, read_manifest, staged_directory, write_manifest
from mllm_assets.cli import main
from mllm_assets.evaluation.metrics import compute_metrics, write_metrics
from mllm_assets.evaluation.predict import evaluate_task
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.layout import Layout
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker.protocol import Reporter
from tests.worker_tasks import evaluation, training

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def root(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two runs of six steps, one of which learns more; each with its evaluation."""
    root = tmp_path_factory.mktemp("project")
    layout = Layout(root)
    shutil.copytree(parity_dir / "data", root / "data")
    shutil.copytree(parity_dir / "model", root / "pretrains" / "model")
    model = root / "pretrains" / "model"
    for name, learning_rate in (("slowly", 1e-5), ("quickly", 3e-3)):
        run_dir = layout.outputs / name / "0123456789abcdef"
        recipe = TrainSpec(
            model_name_or_path="pretrains/model", dataset="gemma3_vlm_train", eval_dataset="gemma3_vlm_val",
            template="gemma3", do_train=True, finetuning_type="full", freeze_multi_modal_projector=False,
            learning_rate=learning_rate, max_steps=6, save_steps=2, logging_steps=1, eval_strategy="steps",
            eval_steps=3,
        )  # fmt: skip
        run = train_task(
            training(recipe, model_dir=model, data_dir=layout.data, run_dir=run_dir, recipe_name=name), Reporter()
        )
        (run_dir.parent / "latest").symlink_to(run_dir.name)
        said = layout.predictions(name, "p")
        evaluate_task(
            evaluation(
                recipe_name=name, model_dir=run_dir / "model", base_model_dir=model, data_dir=layout.data,
                directory=said, max_new_tokens=4,
            ),
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


def test_any_model_is_evaluated_on_any_entry(root: Path, capsys, monkeypatch) -> None:
    """Checkpoint and base model on the entry that was trained on, which no recipe asks about."""
    options = ("--device", "cpu", "--max-new-tokens", "4", "--max-samples", "3", "--json")
    losses = {}
    for model in ("quickly@checkpoint-6", "quickly@checkpoint-2", "pretrained/model"):
        code, output = said(capsys, monkeypatch, root, "evaluate", model, "--on", "gemma3_vlm_train", *options)
        assert code == 0, output.err
        [(entry, facts)] = json.loads(output.out)["entries"].items()
        assert (entry, facts["num_samples"]) == ("gemma3_vlm_train", 3)
        losses[model] = facts["metrics"]["loss"]
    assert sorted(losses, key=lambda name: losses[name]) == list(losses), "six steps learn more than two"
    assert len(list((root / "cache" / "evaluations").iterdir())) == 3
    code, output = said(capsys, monkeypatch, root, "evaluate", "quickly", "--on", "gemma3_vlm_vla")
    assert code == 2 and "The nearest are gemma3_vlm_val" in output.err
    code, output = said(capsys, monkeypatch, root, "evaluate", "quickly", "--on", "a", "--checkpoint", "4")
    assert code == 2 and "name the checkpoint as the model: quickly@checkpoint-4" in output.err


def test_figures_of_some_samples_say_so(root: Path, capsys, monkeypatch) -> None:
    """They were in the run's folder like those of all samples."""
    options = ("--device", "cpu", "--max-new-tokens", "4", "--max-samples", "3")
    code, output = said(capsys, monkeypatch, root, "evaluate", "slowly", *options)
    assert code == 0 and output.out.startswith("gemma3_vlm_val, 3 samples spread over it\n")
    written = json.loads((root / "outputs" / "slowly" / "latest" / "checkpoint_metrics.json").read_text())
    assert (written["max_samples"], written["num_samples"]) == (3, {"gemma3_vlm_val": 3})


def test_runs_that_were_asked_other_samples_are_not_compared_silently(
    root: Path, tmp_path, capsys, monkeypatch
) -> None:
    shutil.copytree(root, tmp_path / "project", symlinks=True)
    layout = Layout(tmp_path / "project")
    directory = layout.metrics("quickly", "m")
    inputs = read_manifest(directory)["inputs"]
    all_rows = read_predictions(layout.root / inputs["predictions_path"])
    few, two = all_rows.filter(pc.field("row_index") < 3), layout.predictions("quickly", "two")
    other = all_rows.set_column(all_rows.schema.get_field_index("entry"), "entry", pa.array(["other"] * len(all_rows)))

    def evaluated(rows: pa.Table) -> None:
        shutil.rmtree(directory)
        shutil.rmtree(two, ignore_errors=True)
        with staged_directory(two) as staging:
            pq.write_table(rows, staging / "predictions.parquet")
            write_manifest(staging, {})
        facts = {**inputs, "predictions_path": layout.relative(two)}
        write_metrics(directory, compute_metrics(read_predictions(two), ["a"]), facts)

    page = str(tmp_path / "page.html")
    evaluated(few)
    code, output = said(capsys, monkeypatch, layout.root, "compare", "slowly", "quickly", "--output", page)
    assert code == 2 and "(samples of the first: gemma3_vlm_val 8; of the second: gemma3_vlm_val 3)" in output.err
    evaluated(pa.concat_tables([all_rows, other]))
    code, output = said(capsys, monkeypatch, layout.root, "compare", "slowly", "quickly", "--output", page)
    assert code == 0 and "note: left out, because the runs were not asked the same samples: other" in output.err
    assert "Left out, because both were not asked the same samples: other." in Path(page).read_text()


def test_a_newest_run_that_was_not_evaluated_is_said_and_the_last_that_was_is_shown(
    root: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """`mllm-assets train` moves `latest`, and then nothing of the recipe could be compared."""
    shutil.copytree(root, tmp_path / "project", symlinks=True)
    outputs = tmp_path / "project" / "outputs"
    newest = outputs / "quickly" / "fedcba9876543210"
    shutil.copytree(outputs / "slowly" / "0123456789abcdef", newest)
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps({**manifest, "data_digests": {"gemma3_vlm_val": "d"}}))
    point_symlink(outputs / "quickly" / "latest", newest)
    page = tmp_path / "page.html"
    code, output = said(
        capsys, monkeypatch, tmp_path / "project", "compare", "slowly", "quickly", "--output", str(page)
    )
    assert code == 0, output.err
    note = "the newest run of quickly was not evaluated; the page shows outputs/quickly/0123456789abcdef, the last that"
    command = "mllm-assets run quickly/eval_metrics"
    assert note in output.err and command in output.err and "quickly/0123456789abcdef" in page.read_text()
    code, output = said(capsys, monkeypatch, tmp_path / "project", "summary", "quickly")
    assert "none yet of this run; the last run that was evaluated is outputs/quickly/0123456789abcdef" in output.out
    assert command in output.out


def test_what_cannot_be_evaluated_is_named(root: Path, capsys, monkeypatch) -> None:
    code, output = said(capsys, monkeypatch, root, "evaluate", "quickly", "--checkpoint", "5")
    assert code == 2 and "has no complete checkpoint '5'; it has: 2, 4, 6." in output.err
    code, output = said(capsys, monkeypatch, root, "evaluate", "nothing")
    assert code == 2 and "nothing is neither the directory of a training run nor a recipe" in output.err


def test_two_runs_are_compared_on_one_page_that_needs_no_other_file(
    root: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    page = tmp_path / "page.html"
    code, output = said(
        capsys, monkeypatch, root, "compare", "slowly", "quickly/0123456789abcdef", "--output", str(page)
    )
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


def test_a_run_beside_itself_is_said(root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    names = ("slowly", "slowly/0123456789abcdef")
    code, output = said(capsys, monkeypatch, root, "compare", *names, "--output", str(tmp_path / "page.html"))
    assert code == 0 and "note: both are the same run, outputs/slowly/0123456789abcdef" in output.err


def test_a_run_without_metrics_is_not_compared(root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    copy = tmp_path / "outputs" / "other" / "run"
    shutil.copytree(root / "outputs" / "slowly" / "0123456789abcdef", copy)
    assert read_manifest(copy)
    code, output = said(capsys, monkeypatch, root, "compare", "slowly", str(copy))
    assert code == 2 and "was not evaluated: there are no metrics of" in output.err
