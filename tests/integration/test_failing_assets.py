"""An error at the very end of any asset's body: one line for the user, no second attempt, nothing half-recorded."""

import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from mllm_assets.components.reporting import load_project
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.errors import DataError
from tests.integration.conftest import EVERYTHING_PASSES, Project, copied_project, line_of

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]

MESSAGE = "the last of all is torn. Repair it."
# Assets -> what the domain does last for them
LAST = {
    "pretrained/gemma3_tiny": "pretrained_model.describe_model",
    "emoji/raw": "assets.dataset.ingest",
    "emoji/sample_quality": "assets.dataset.write_report",
    "emoji/corrections": "assets.corrections.settle",
    "emoji/train emoji/val emoji/test": "assets.dataset.splits_share_no_image",
    "emoji/dataset_info": "assets.dataset.register",
    "mine/vision_features": "resources.AcceleratorResource.run",
    "mine/checkpoint": "assets.checkpoint.point_latest",
    "mine/predictions": "assets.evaluation.store_table",
    "mine/eval_metrics": "assets.evaluation.evaluate_gates",
    "mine/released_model": "assets.release.current_release",
    "mine/hub_model": "assets.release.table",
}


@pytest.fixture(scope="module")
def whole(emoji_ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Project, dg.Definitions]]:
    """A project with a store, in which every asset is made."""
    with (
        pytest.MonkeyPatch.context() as patch,
        copied_project(emoji_ready, tmp_path_factory.mktemp("whole") / "p") as p,
    ):
        patch.setenv("MLLM_ASSETS_ROOT", str(p.root))
        patch.setenv("MLLM_ASSETS_STORE", (p.root / "store").as_uri())
        p.write_recipe("mine", max_steps=2, max_samples=16, freeze_vision_tower=True)
        p.set_defaults(gates=EVERYTHING_PASSES)
        path = p.root / p.package / "defs" / "recipes" / "defs.yaml"
        component = yaml.safe_load(path.read_text())
        component["attributes"]["defaults"]["push_to_hub"] = {"repo_id": "me/mine"}
        path.write_text(yaml.safe_dump(component))
        p.made(f'{line_of("mine")} or key:"mine/vision_features" or key:"mine/hub_model"')
        yield p, load_project(p.root)


def traces(project: Project) -> tuple[list[dict[str, Any]], list[Path]]:
    """What is in the table `runs`, and what is in the store."""
    rows = QualityStore(project.layout.quality_db).query("SELECT run_id, asset FROM runs ORDER BY ALL")
    return rows, sorted((project.root / "store").rglob("*"))


def then_failing(real: Callable[..., Any]) -> Callable[..., Any]:
    def fails(*args: Any, **kwargs: Any) -> Any:
        real(*args, **kwargs)
        raise DataError(MESSAGE)

    return fails


@pytest.mark.parametrize("names", LAST)
def test_an_error_at_the_very_end_is_one_line_and_leaves_no_trace(
    names: str, whole: tuple[Project, dg.Definitions], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some bodies ran domain code after the block that translated errors: people got a traceback and a retry."""
    project, definitions = whole
    before = traces(project)
    assert set(names.split()) <= {row["asset"] for row in before[0]}
    place, _, name = LAST[names].rpartition(".")
    owner = pkgutil.resolve_name(f"mllm_assets.components.{place}")
    monkeypatch.setattr(owner, name, then_failing(getattr(owner, name)))
    with dg.DagsterInstance.from_config(str(project.home)) as instance:
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            asset_selection=[dg.AssetKey(name.split("/")) for name in names.split()],
            instance=instance,
            raise_on_error=False,
        )
    [failure] = result.get_step_failure_events()
    said = failure.step_failure_data.user_failure_data
    assert said is not None and said.description == MESSAGE
    kinds = {event.event_type_value for event in result.all_events}
    assert not kinds & {"STEP_UP_FOR_RETRY", "ASSET_MATERIALIZATION"}
    assert traces(project) == before
