"""What `doctor --repair` advises can be typed."""

import json
from pathlib import Path

from mllm_assets.layout import Layout
from mllm_assets.operations.repair import find_damages, repair


def test_a_split_is_made_again_with_the_one_that_is_made_beside_it(layout: Layout) -> None:
    """Dagster refuses a selection of one: the advice led to an error."""
    layout.data.mkdir()
    (layout.data / "sides").symlink_to(Path(".versions", "sides", "gone"))
    [damage] = find_damages(layout)
    assert "mllm-assets run sides/train" in damage.cure


def test_entries_that_could_not_be_written_again_are_not_said_to_be_back(layout: Layout) -> None:
    layout.data.mkdir()
    layout.dataset_info.write_text('{"cut": ')
    [finding] = repair(layout)
    assert "no dataset here has splits to write entries of" in finding.detail
    assert not layout.dataset_info.exists() or json.loads(layout.dataset_info.read_text()) == {}
