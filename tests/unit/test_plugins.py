"""A model family, a metric, a gate, a source and a quality probe from outside of the package, each in one object."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mllm_assets import plugins
from mllm_assets.cli import main
from mllm_assets.cli.summary import _metrics
from mllm_assets.components import ImageTextDataset
from mllm_assets.components.loading import forget
from mllm_assets.data.ingest import flags, kinds, sources
from mllm_assets.data.quality import decoding
from mllm_assets.data.quality.assess import assess
from mllm_assets.data.quality.report import write_report
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.errors import RecipeError
from mllm_assets.evaluation import gates, scores
from mllm_assets.evaluation.comparison import _metric_rows
from mllm_assets.evaluation.gates import GateSpec, evaluate_gates, failed
from mllm_assets.evaluation.metrics import compute_metrics, gains_over_release, sample_metrics
from mllm_assets.families import family
from mllm_assets.layout import Layout
from mllm_assets.releases.model_card import _metric_table
from mllm_assets.settings import PLUGINS
from tests.unit.data.quality.made_images import encode
from tests.unit.evaluation.made_predictions import predictions

pytestmark = pytest.mark.not_fast

HOOKS = Path(__file__).parents[2] / "docs/hooks"
REGISTRIES = (family.FAMILIES, family.TEMPLATES, scores.METRICS, gates.GATES, kinds.KINDS, flags.PROBES)
OUTSIDE = """
import os, sys
import numpy as np
from mllm_assets.data.ingest import flags, kinds
from mllm_assets.data.ingest.source_rows import SourceRow
from mllm_assets.evaluation import gates, scores
from mllm_assets.families import family
from mllm_assets.families.turn_format import Template

with open(os.environ["LOADED"], "a") as file:
    print(" ".join(sys.orig_argv[1:]), file=file)

def rows(source, root):
    for index, path in enumerate(sorted((root / source.path).iterdir())):
        yield SourceRow(row_index=index, location=path.name, images=(path.read_bytes(),), caption=path.stem)

def few_words(metrics, spec, release_gains):
    return gates.gain_gate("answers_are_short", metrics, "tuned_over_base", 0.5, over="over", metric="num_words")

family.register(family.Family(
    name="Tiny VL", model_type="tiny_vl", example="made/tiny-vl", processor="TinyProcessor", image_token="<i>",
    templates={"tiny_turns": Template(user="Q {content} A")}))
scores.register(scores.Metric(
    name="num_words", unit="words", definition="mean number of words of an answer", headline=True,
    higher_is_better=False, score=lambda said: np.array([float(len(answer.split())) for answer in said.answers])))
gates.register(gates.Gate(name="answers_are_short", claim="Its answers are shorter than before.", judge=few_words))
kinds.register(kinds.SourceKind(name="named_files", description="Images whose names are their captions.", read=rows))
flags.register(flags.Probe(
    name="image_narrow", score=lambda image: image.width_px / 100, limit=0.3, sql="width_px / 100",
    title="width / 100"))
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a project that names its plugin; what it registered is gone afterwards."""
    (tmp_path / "outside_parts.py").write_text(OUTSIDE)
    (tmp_path / "pyproject.toml").write_text('[tool.mllm_assets]\nplugins = ["outside_parts"]\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(PLUGINS, "")
    monkeypatch.setenv("LOADED", str(tmp_path / "loaded"))
    before = [dict(registry) for registry in REGISTRIES]
    plugins.load_plugins()
    forget()
    yield tmp_path
    forget()
    sys.modules.pop("outside_parts")
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


def test_a_family_from_outside_is_found_by_model_processor_and_recipe(outside: Path) -> None:
    found = family.family_of("tiny_vl")
    assert found is family.processor_family(type("TinyProcessor", (), {})())
    family.require_template("tiny_turns", found, "a folder")
    assert family.find_template(None, found).user == "Q {content} A"
    assert "Tiny VL (tiny_vl)" in family.known_families()


def test_a_metric_from_outside_is_measured_compared_and_shown(outside: Path) -> None:
    table = predictions()
    metrics = compute_metrics(table, ["cat", "dog"])
    entry, scored = next(iter(metrics["entries"].items()))
    assert scored["models"]["tuned"]["num_words"] >= 1
    assert scored["gains"]["tuned_over_base"]["num_words"]["num_pairs"] == scored["num_samples"]
    assert metrics["definitions"]["num_words"] == "mean number of words of an answer"
    assert all("num_words" in row for row in sample_metrics(table))
    assert any(line.split()[:1] == ["num_words"] for line in _metrics(metrics))
    compared = _metric_rows([metrics, metrics], gains_over_release(table, table))
    assert "+0" in next(row["gain"] for row in compared if row["metric"] == "num_words")
    assert "num_words" in [row[0] for row in _metric_table(scored)]


def test_a_gate_from_outside_judges_and_is_a_check_that_blocks(outside: Path) -> None:
    import dagster as dg

    from mllm_assets.definitions import defs

    results = evaluate_gates(compute_metrics(predictions(), ["cat", "dog"]), GateSpec())
    assert "answers_are_short" in [result.name for result in failed(results)]
    graph = defs().resolve_asset_graph()
    node = graph.get(dg.AssetCheckKey(dg.AssetKey(["emoji_sft", "eval_metrics"]), "answers_are_short"))
    assert node.blocking and node.description == "Its answers are shorter than before."  # pyright: ignore


def test_a_source_and_a_probe_from_outside_reach_the_report_and_the_saved_views(outside: Path) -> None:
    from PIL import Image

    layout = Layout(outside)
    QualityStore(layout.quality_db).query("SELECT 1")  # views of before the next probe
    (outside / "pictures").mkdir()
    for name, width in (("wide", 90), ("slim", 20)):
        (outside / "pictures" / f"{name}.png").write_bytes(encode(Image.effect_noise((width, 40), 80).convert("RGB")))
    dataset = ImageTextDataset.model_validate(
        {"name": "mine", "source": {"kind": "named_files", "path": "pictures"}, "prompts": ["What?"]}
    ).spec()
    flags.register(flags.Probe(name="image_low", score=lambda image: image.height_px / 100, sql="height_px / 100"))
    raw = sources.ingest(dataset, layout)
    assert raw.num_samples == 2
    decoding.end_workers()  # those that wait since another test were started without the plugin
    found = assess(dataset, layout, raw.directory, "run")
    assert found.flags["image_narrow"] == 1 and found.flags["image_low"] == 2
    scored = QualityStore(layout.quality_db).query("SELECT score FROM image_scores WHERE issue = 'image_low'")
    assert [row["score"] for row in scored] == [0.4, 0.4]
    assert "image_narrow" in write_report(raw.directory, found.directory).markdown.replace("&#95;", "_")
    processes = (outside / "loaded").read_text()
    assert "mllm_assets.data.quality.decoding" in processes, "what decodes images knows the plugin too"


def test_what_is_registered_outside_is_in_the_reference(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HOOKS))
    for name in ("metadata_keys", "reference"):
        sys.modules.pop(name, None)
    from metadata_keys import METADATA_KEYS  # pyright: ignore[reportMissingImports]
    from reference import registered  # pyright: ignore[reportMissingImports]

    page = registered()
    for name in ("tiny_vl", "num_words", "answers_are_short", "named_files", "image_narrow"):
        assert f"| `{name}` |" in page
    assert METADATA_KEYS["eval_metrics"]["num_words"] == "Mean number of words of an answer."


def test_the_processes_that_a_run_starts_load_the_plugin(outside: Path) -> None:
    request = outside / "request.json"
    request.write_text(json.dumps({"task": "none"}))
    command = [sys.executable, "-m", "mllm_assets.worker", str(request), str(outside / "result.json")]
    subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, timeout=120
    )
    assert f"-m mllm_assets.worker {request}" in (outside / "loaded").read_text()


def test_a_plugin_that_cannot_be_imported_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PLUGINS, "no_such_plugin")
    assert main(["releases", "list"]) == 2
    error = capsys.readouterr().err
    assert "The plugin 'no_such_plugin' cannot be imported (ModuleNotFoundError" in error and PLUGINS in error


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(RecipeError, match="The metric 'loss' already exists. Register yours under another name."):
        scores.register(scores.Metric(name="loss", unit="", definition=""))
