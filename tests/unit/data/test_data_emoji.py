"""The embedded dataset: the counts of the demo, and files that belong together."""

import json
from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq
from made_datasets import made_spec, run_line

from mllm_assets.data.checks import splits_share_no_image
from mllm_assets.data.spec import SourceSpec
from mllm_assets.layout import Layout
from mllm_assets.sample_data.rebuild import HERE, read_annotations, read_selection

CLDR = """<?xml version="1.0"?><ldml><annotations>
<annotation cp="😀">face | grin | grinning face</annotation>
<annotation cp="😀" type="tts">grinning face</annotation>
</annotations></ldml>"""


def test_the_demo_line_gives_680_and_120_of_800(layout: Layout, golden: Callable[[str, Any], None]) -> None:
    """The golden holds digests too: the same inputs give the same data versions on every machine."""
    source = SourceSpec(kind="parquet", path="package:emoji.parquet", label_column="group")
    spec = made_spec(680, 120, name="emoji", source=source, answer="{label}", prompts=("What kind of emoji is this?",))
    raw, quality, version = run_line(spec, layout)
    train = json.loads((version.directory / "train.json").read_text())
    golden(
        "emoji_data",
        {
            "raw_digest": raw.digest,
            "num_raw": version.num_raw,
            "num_train": version.num_train,
            "num_val": version.num_val,
            "num_unused": version.num_unused,
            "num_rejected": version.num_rejected,
            "num_duplicates": quality.num_duplicates,
            "flags": quality.flags,
            "split_digest": version.digest,
            "first_row": train[0],
            "dataset_info": json.loads(layout.dataset_info.read_text()),
        },
    )
    assert splits_share_no_image(version.directory, layout.data).passed


def test_the_selection_is_that_of_the_shipped_file() -> None:
    rows = pq.read_table(HERE / "emoji.parquet", columns=["emoji", "subgroup"]).to_pylist()
    assert [(item.emoji, item.subgroup) for item in read_selection()] == [(r["emoji"], r["subgroup"]) for r in rows]


def test_names_and_keywords_are_read_from_cldr(layout: Layout) -> None:
    for folder in ("annotations", "annotationsDerived"):
        (layout.root / folder).mkdir(parents=True)
        (layout.root / folder / "en.xml").write_text(CLDR, encoding="utf-8")
    assert read_annotations(layout.root) == {"😀": ("grinning face", ["face", "grin"])}
