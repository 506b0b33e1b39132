"""`<dataset>/label_issues`: rows are judged by what did not see them, and reviewing begins with the most suspicious."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm_assets.data.quality.browse import SampleQuery, browse
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.recipe.load import load_recipe
from mllm_assets.training.runs.plan import plan_run
from mllm_assets.worker.fold_task import FoldsTask
from mllm_assets.worker.launch import run_worker
from mllm_assets.worker.tasks import CacheSettings
from tests.integration.conftest import Project

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]


def small(project: Project) -> None:
    project.write_recipe("mine", freeze_vision_tower=True, max_steps=2, max_samples=60, eval_dataset=None)


def test_labels_are_ranked_and_reviewing_begins_with_the_worst(project: Project) -> None:
    pytest.importorskip("cleanlab")
    small(project)
    path = project.root / project.package / "defs" / "datasets" / "emoji" / "defs.yaml"
    component: dict[str, Any] = yaml.safe_load(path.read_text())
    component["attributes"]["label_issues"] = {"recipe": "mine"}
    path.write_text(yaml.safe_dump(component))
    project.made('key:"emoji/label_issues"')
    assert project.metadata("emoji", "label_issues")["num_rows"] > 500
    page = browse(project.layout, SampleQuery(dataset="emoji", order="most suspicious first"))
    assert all("likelier by its picture" in sample.issue for sample in page.samples[:5])
    assert "already holds this ranking" in project.made('key:"emoji/label_issues"')


def test_each_fold_is_scored_by_a_model_without_it_and_is_not_trained_twice(project: Project, tmp_path: Path) -> None:
    """`review` by the loss of a row that was trained on finds 0.64 of planted wrong labels, not 0.9."""
    small(project)
    recipe = load_recipe(project.root / "configs" / "mine.yaml")
    ids = [row.id for row in Dataset.of_recipe(recipe.spec, project.root).entry("emoji_train").rows[:60]]
    plan = plan_run(recipe, root=project.root)
    caches = CacheSettings(features_root=project.layout.features)
    task = FoldsTask(
        run=replace(plan.task, caches=caches),
        directory=project.layout.folds / "0123456789abcdef",
        folds={row_id: number % 2 for number, row_id in enumerate(ids)},
        asked=tuple(ids[:-1]),
    )
    losses = run_worker(task).losses
    assert losses.keys() == set(ids[:-1]) and all(0 < loss < 20 for loss in losses.values())
    (task.directory / "fold-1.json").unlink()
    kept = (task.directory / "fold-0.json").stat().st_mtime_ns
    assert run_worker(task).losses == losses
    assert (task.directory / "fold-0.json").stat().st_mtime_ns == kept
    assert not plan.directory.exists(), "nothing of a fold is a run of the recipe"
