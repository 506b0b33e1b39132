"""A damaged file between two assets: whoever reads it passes it by or names what makes it again, and that works."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from mllm_assets.components.reporting import load_project
from mllm_assets.operations.repair import find_damages
from tests.damage import DAMAGES
from tests.integration.conftest import Project, copied_project

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.attack("damage"),
]
# The file, what happens to it, who reads it, and who makes it
CASES = {
    "data/.raw/emoji/*/samples.parquet": ("flipped", "emoji/sample_quality", "emoji/raw"),
    "data/quality.duckdb": ("cut", "emoji/sample_quality", "emoji/sample_quality"),
    "data/.versions/emoji/*/train.json": ("gone", "mine/checkpoint", "emoji/train emoji/val emoji/test"),
    "data/.versions/emoji/*/val.json": ("flipped", "mine/predictions", "emoji/train emoji/val emoji/test"),
    "pretrains/gemma3_tiny/model.safetensors": ("flipped", "mine/predictions", "pretrained/gemma3_tiny"),
    "cache/features/*/*/tensors.safetensors": ("flipped", "mine/predictions", "mine/vision_features"),
    "outputs/mine/*/model/model.safetensors": ("flipped", "mine/predictions", "mine/checkpoint"),
    "outputs/mine/*/manifest.json": ("cut", "mine/checkpoint", "mine/checkpoint"),
    "outputs/mine/predictions/*/predictions.parquet": ("flipped", "mine/eval_metrics", "mine/predictions"),
    "outputs/mine/eval_metrics/*/eval_metrics.json": ("cut", "mine/released_model", "mine/eval_metrics"),
    "releases/mine/v1/model.safetensors": ("flipped", "mine/hub_model", "mine/released_model"),
}


@pytest.fixture(scope="module")
def whole(line_ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Project, dg.Definitions]]:
    """A project in which every asset is made."""
    with (
        pytest.MonkeyPatch.context() as patch,
        copied_project(line_ready, tmp_path_factory.mktemp("whole") / "p") as p,
    ):
        patch.setenv("MLLM_ASSETS_ROOT", str(p.root))
        yield p, load_project(p.root)


def why_not_made(whole: tuple[Project, dg.Definitions], names: str) -> str:
    """Materialise assets; the one line that the step failed with, empty where it did not."""
    project, definitions = whole
    with dg.DagsterInstance.from_config(str(project.home)) as instance:
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            asset_selection=[dg.AssetKey(name.split("/")) for name in names.split()],
            instance=instance,
            raise_on_error=False,
        )
    if result.success:
        return ""
    [failure] = result.get_step_failure_events()
    said = failure.step_failure_data.user_failure_data
    assert said is not None and said.description and "\n" not in said.description
    return said.description


@pytest.mark.parametrize("pattern", CASES)
def test_what_is_damaged_is_passed_by_or_made_again_as_the_message_says(
    pattern: str, whole: tuple[Project, dg.Definitions]
) -> None:
    """A flipped bit in the predictions gave other metrics, and the asset said ok."""
    project, _ = whole
    damage, reader, maker = CASES[pattern]
    paths = [path for path in sorted(project.root.glob(pattern)) if not path.parent.name.startswith(".")]
    path = max(paths, key=lambda path: path.stat().st_mtime)  # metrics are made again once there is a release
    DAMAGES[damage](path)
    if reader == "mine/predictions":  # else what is there answers for them
        shutil.rmtree(project.layout.outputs / "mine" / "predictions")
    if said := why_not_made(whole, reader):
        name = maker.split()[0]
        assert name in said or name.split("/")[-1] in said
        assert why_not_made(whole, maker) == ""
        assert why_not_made(whole, reader) == ""
    else:
        assert why_not_made(whole, maker) == ""
    left = [found for found in find_damages(project.layout) if found.kind != "release"]
    assert left == []
