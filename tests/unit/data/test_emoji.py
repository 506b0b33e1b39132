"""The embedded dataset: files that belong together."""

import pyarrow.parquet as pq

from mllm_assets.layout import Layout
from mllm_assets.sample_data.rebuild import HERE, read_annotations, read_selection

CLDR = """<?xml version="1.0"?><ldml><annotations>
<annotation cp="😀">face | grin | grinning face</annotation>
<annotation cp="😀" type="tts">grinning face</annotation>
</annotations></ldml>"""


def test_the_selection_is_that_of_the_shipped_file() -> None:
    rows = pq.read_table(HERE / "emoji.parquet", columns=["emoji", "subgroup"]).to_pylist()
    assert [(item.emoji, item.subgroup) for item in read_selection()] == [(r["emoji"], r["subgroup"]) for r in rows]


def test_names_and_keywords_are_read_from_cldr(layout: Layout) -> None:
    for folder in ("annotations", "annotationsDerived"):
        (layout.root / folder).mkdir(parents=True)
        (layout.root / folder / "en.xml").write_text(CLDR, encoding="utf-8")
    assert read_annotations(layout.root) == {"😀": ("grinning face", ["face", "grin"])}
