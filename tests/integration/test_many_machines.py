"""What one machine made, another goes on from: real runs, the real s3fs, an empty root."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mllm_assets.artifacts import find_damage
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.layout import Layout
from tests.integration.conftest import EVERYTHING_PASSES, Project, line_of
from tests.integration.s3_server import BUCKET, S3Server, s3_server

pytest.importorskip("s3fs", reason="the extra s3 is not installed")
pytest.importorskip("moto", reason="the extra e2e is not installed")
pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(2400)]


FEW = {"num_train": 80, "num_val": 24}  # each image is sent, and fetched on every machine


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with s3_server(monkeypatch) as server:
        server.make_bucket()
        monkeypatch.setenv("MLLM_ASSETS_STORE", f"s3://{BUCKET}/team")
        yield server


def made(project: Project, selection: str) -> str:
    process = project.materialize(selection)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "planted" not in output, "no key of the store is in a log"
    return output


def scores(project: Project) -> dict[str, float]:
    """Every figure of the latest `eval_metrics`."""
    found = project.metadata("mine", "eval_metrics")
    figures = {n: v for n, v in found.items() if isinstance(v, int | float) and not n.startswith("cost_")}
    assert "num_samples" in figures and len(figures) > 5
    return figures


def test_a_second_machine_scores_what_the_first_one_trained(
    project: Project, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.set_split(**FEW)
    project.write_recipe("mine", max_steps=3, freeze_vision_tower=True)
    project.set_defaults(gates=EVERYTHING_PASSES)
    output = made(project, '+key:"mine/released_model"')
    assert "went to s3://models/team" in output
    first, trained = scores(project), project.metadata("mine", "checkpoint")
    sent = len(s3.requests)
    assert not any("pretrains" in request or "/.raw/" in request for request in s3.requests)

    # the same Dagster instance, another machine with an empty root
    second = Layout(tmp_path / "second")
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(second.root))
    output = made(project, 'key:"mine/eval_metrics"')
    run_dir = second.root / trained["path"]
    assert scores(project) == first and "was fetched from s3://models/team" in output
    assert find_damage(run_dir, only=["model"]) is None and (second.outputs / "mine" / "latest").resolve() == run_dir
    assert not second.pretrains.exists()
    assert (second.releases("mine") / "current").resolve().name == "v1"

    # an instance of its own as well: the whole line, and nothing is trained or asked again
    third = replace(project, home=tmp_path / "home")
    third.home.mkdir()
    shutil.copy(project.home / "dagster.yaml", third.home)
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(tmp_path / "third"))
    made(third, '+key:"mine/released_model"')
    assert scores(third) == first
    again = third.metadata("mine", "checkpoint")
    assert again["already_finished"] and again["fingerprint"] == trained["fingerprint"]
    assert third.metadata("mine", "vision_features")["num_images_computed"] == 0
    assert third.metadata("emoji", "sample_quality")["num_decoded"] == 0, "images were measured elsewhere"
    assert third.metadata("mine", "released_model")["version"] == "v1"
    membership = "SELECT count(*) AS n FROM split_membership WHERE dataset = 'emoji'"
    [ours] = QualityStore(Layout(tmp_path / "third").quality_db).query(membership)
    [theirs] = QualityStore(project.layout.quality_db).query(membership)
    assert ours == theirs
    assert len(s3.requests) > sent and os.environ["MLLM_ASSETS_STORE"] not in str(again)


def test_a_failed_upload_fails_the_asset_and_the_next_one_only_sends(project: Project, s3: S3Server) -> None:
    project.set_split(**FEW)
    project.write_recipe("mine", max_steps=1)
    made(project, 'key:"emoji/train" or key:"emoji/val" or key:"emoji/test" or key:"emoji/dataset_info"')
    s3.forbidden = ("PUT", "POST")
    line = project.materialize(line_of("mine", "checkpoint"))
    output, _ = line.communicate(timeout=500)
    assert line.returncode == 1 and "refuses this machine" in output and "planted" not in output
    s3.forbidden = ()
    made(project, line_of("mine", "checkpoint"))
    assert project.metadata("mine", "checkpoint")["already_finished"]
