"""docs/quality-database.md: its queries give what it prints, and it knows every table and flag."""

import re
from pathlib import Path

import pytest

from mllm_assets.data.curate.splits import split
from mllm_assets.data.ingest.flags import PROBES
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.data.ingest.split_spec import SplitSpec
from mllm_assets.data.quality.assess import assess
from mllm_assets.data.quality.schema import TABLES
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.quality.views import VIEWS
from mllm_assets.layout import Layout

pytestmark = pytest.mark.not_fast

PAGE = (Path(__file__).parents[4] / "docs" / "quality-database.md").read_text(encoding="utf-8")


def test_every_query_of_the_page_gives_the_table_below_it(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    source = SourceSpec(kind="parquet", path="package:emoji.parquet", label_column="group")
    spec = DatasetSpec(
        name="emoji",
        source=source,
        prompts=("What kind of emoji is this?",),
        answer="{label}",
        split=SplitSpec(num_train=560, num_val=120, num_test=120),
    )
    raw = ingest(spec, layout)
    quality = assess(spec, layout, raw.directory, "run-1")
    split(spec, layout, raw.directory, quality.directory, "run-1")
    found = re.findall(r"```sql\n(.*?)```\n\n((?:\|[^\n]*\n)+)", PAGE, flags=re.DOTALL)
    assert len(found) == 5
    for sql, printed in found:
        rows = QualityStore(layout.quality_db).query(sql)
        lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
        lines += ["| " + " | ".join("" if v is None else str(v) for v in row.values()) + " |" for row in rows]
        assert printed.splitlines() == lines, sql


def test_the_page_names_every_table_view_and_flag() -> None:
    assert [name for name in (*TABLES, *VIEWS, *PROBES) if f"`{name}`" not in PAGE] == []
