"""`strategy: guide`: the split of the original guide's script, on a restatement of it with its own library."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import mllm_assets
from mllm_assets.data.curate.checks import counts_add_up, splits_share_no_image
from mllm_assets.data.curate.leaks import release_leaks, require_sound_versions
from mllm_assets.data.ingest.spec import DatasetSpec, OutputSpec, SourceSpec
from mllm_assets.data.ingest.split_spec import SIDES, SplitSpec, guide_places
from mllm_assets.data.quality.queries import ask
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import DataError
from mllm_assets.layout import Layout
from tests.damage import publish_changed
from tests.unit.data.made_datasets import made_spec, png, run_line, write_source

pytestmark = pytest.mark.not_fast

PROMPTS = tuple(f"Question {n}?" for n in range(5))
SHIPPED = Path(mllm_assets.__file__).parent / "defs" / "datasets"


def as_the_script(path: Path, num_train: int, num_val: int, prompts: Any, answer: Any, prefix: str) -> dict[str, Any]:
    """What the guide's script writes: `datasets`' shuffle with seed 42, first train, next val, prompts in turn."""
    import datasets

    rows = datasets.Dataset(pq.read_table(path)).shuffle(seed=42)
    if len(rows) < num_train + num_val:
        num_train = int(len(rows) * num_train / (num_train + num_val))
        num_val = len(rows) - num_train
    parts = {"train": range(num_train), "val": range(num_train, num_train + num_val)}
    return {
        side: [
            {
                "messages": [
                    {"role": "user", "content": f"<image>{prompts[index % len(prompts)]}"},
                    {"role": "assistant", "content": answer(rows[place])},
                ],
                "images": [f"images/{prefix}_{side}_{index:06d}.png"],
                "bytes": rows[place]["image"],
            }
            for index, place in enumerate(part)
        ]
        for side, part in parts.items()
    }


def as_published(layout: Layout, name: str = "made") -> dict[str, Any]:
    found = {}
    for side in ("train", "val"):
        rows = json.loads((layout.data / name / f"{side}.json").read_text())
        found[side] = [
            {
                "messages": row["messages"],
                "images": row["images"],
                "bytes": (layout.data / row["images"][0]).read_bytes(),
            }
            for row in rows
        ]
    return found


@pytest.mark.parametrize(("num_rows", "num_train", "num_val"), [(60, 40, 7), (23, 500, 50), (12, 11, 1)])
def test_the_samples_prompts_and_names_are_the_scripts(
    layout: Layout, num_rows: int, num_train: int, num_val: int
) -> None:
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(num_rows)])
    spec = made_spec(num_train, num_val, strategy="guide", prompts=PROMPTS, output=OutputSpec(image_prefix="naruto"))
    *_, version = run_line(spec, layout)
    assert counts_add_up(version).passed
    expected = as_the_script(
        layout.root / "source.parquet", num_train, num_val, PROMPTS, lambda row: row["text"], "naruto"
    )
    assert as_published(layout) == expected


def test_a_test_split_is_of_the_rows_that_the_script_leaves() -> None:
    two = guide_places(60, SplitSpec(num_train=30, num_val=20, num_test=0, strategy="guide"))
    assert [sum(side == name for side, _ in two.values()) for name in SIDES] == [30, 20, 0]
    three = guide_places(70, SplitSpec(num_train=30, num_val=20, strategy="guide"))
    without = guide_places(70, SplitSpec(num_train=30, num_val=20, num_test=0, strategy="guide"))
    assert {row: place for row, place in three.items() if place[0] != "test"} == without
    assert len(three) == 70
    assert guide_places(0, SplitSpec()) == {}


@pytest.mark.parametrize("name", ["naruto", "pokemon", "food101"])
def test_the_shipped_datasets_can_be_switched_to_it(layout: Layout, name: str) -> None:
    """Prompts and answers are those of their YAML; pictures and texts stand in for the Hub's."""
    from mllm_assets.components import ImageTextDataset

    attributes = yaml.safe_load((SHIPPED / name / "defs.yaml").read_text())["attributes"]
    attributes["split"] = {"num_train": 20, "num_val": 4, "strategy": "guide"}
    attributes["output"] = {"image_prefix": "food" if name == "food101" else name}
    spec = ImageTextDataset.model_validate(attributes).spec()
    names = ["apple_pie", "baby_back_ribs"]
    texts = [f"picture {n}" for n in range(40)]
    features = {"label": {"_type": "ClassLabel", "names": names}}
    table = pa.table({"image": [png(n) for n in range(40)], "text": texts, "label": [n % 2 for n in range(40)]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), layout.root / "source.parquet")
    stand_in = replace(spec.source, kind="parquet", repo="", revision=None, path="source.parquet")
    spec = replace(spec, source=stand_in)
    run_line(spec, layout)

    def answer(row: Any) -> str:
        return f"This image shows {names[row['label']].replace('_', ' ')}." if name == "food101" else row["text"]

    pq.write_table(table, layout.root / "plain.parquet")
    expected = as_the_script(
        layout.root / "plain.parquet", 20, 4, spec.prompts, answer, attributes["output"]["image_prefix"]
    )
    assert as_published(layout, name) == expected


def test_a_rejected_sample_leaves_the_others_at_their_places(layout: Layout) -> None:
    """The script skips a failed image with a print; the samples after it keep prompt and name."""
    write_source(layout.root, [(png(n) if n != 7 else b"broken", f"picture {n}") for n in range(30)])
    spec = made_spec(24, 6, strategy="guide", prompts=PROMPTS, output=OutputSpec(image_prefix="naruto"))
    *_, version = run_line(spec, layout)
    assert (version.num_rejected, counts_add_up(version).passed) == (1, True)
    expected = as_the_script(layout.root / "source.parquet", 24, 6, PROMPTS, lambda row: row["text"], "naruto")
    kept = {side: [row for row in rows if row["bytes"] != b"broken"] for side, rows in expected.items()}
    assert as_published(layout) == kept


def with_duplicates(layout: Layout) -> DatasetSpec:
    """Thirty rows of ten pictures each three times: whatever is held is trained on too."""
    write_source(layout.root, [(png(n % 10), f"picture {n}") for n in range(30)])
    return made_spec(24, 6, strategy="guide")


def test_duplicates_across_the_split_are_listed(layout: Layout) -> None:
    *_, version = run_line(with_duplicates(layout), layout)
    outcome = splits_share_no_image(version.directory, layout.data)
    held = {row.images[0].name for row in Dataset(layout.data).entry("made_val").rows}
    trained = {row.images[0].name for row in Dataset(layout.data).entry("made_train").rows}
    assert held & trained, "the test needs some"
    assert sorted(outcome.metadata["pairs"]) == sorted(f"images/{n} = images/{n}" for n in held & trained)
    assert "A release needs `allow_leakage: true` in the recipe's settings" in outcome.description
    listed = {(row["held_out_sample"], row["train_sample"]) for row in ask(layout, "leaks", "made", 1000)}
    by_image = {side: Dataset(layout.data).entry(f"made_{side}").rows for side in ("train", "val")}
    assert listed == {(v.id, t.id) for v in by_image["val"] for t in by_image["train"] if v.images == t.images}


def test_a_release_is_refused_by_what_is_on_the_disk(layout: Layout) -> None:
    *_, version = run_line(with_duplicates(layout), layout)
    digests = {name: Dataset(layout.data).entry(name).digest for name in ("made_train", "made_val")}
    [found] = release_leaks(Dataset(layout.data), ["made_train"], ["made_val"], digests, digests)
    assert found == splits_share_no_image(version.directory, layout.data).description


def test_a_split_of_ours_may_be_released_until_a_file_changes(layout: Layout) -> None:
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
    run_line(made_spec(8, 4), layout)
    digests = {name: Dataset(layout.data).entry(name).digest for name in ("made_train", "made_val")}
    assert release_leaks(Dataset(layout.data), ["made_train"], ["made_val"], digests, digests) == []
    assert release_leaks(Dataset(layout.data), ["made_train"], ["made_train"], digests, digests) == [
        "made_train is both trained on and evaluated on."
    ]
    held, trained = (Dataset(layout.data).entry(f"made_{side}").rows[0].images[0] for side in ("val", "train"))
    held.write_bytes(trained.read_bytes())
    digests["made_val"] = Dataset(layout.data).entry("made_val").digest
    [found] = release_leaks(Dataset(layout.data), ["made_train"], ["made_val"], digests, digests)
    assert found.startswith("1 problems, the first: images/")


def test_a_split_that_changed_since_the_training_is_noticed(layout: Layout) -> None:
    """Another seed may put what the model was trained on into the validation, where it looks like a success."""
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
    run_line(made_spec(8, 4), layout)
    digests = {name: Dataset(layout.data).entry(name).digest for name in ("made_train", "made_val")}
    run_line(made_spec(8, 4, seed=7), layout)
    now = {"made_val": Dataset(layout.data).entry("made_val").digest}
    [found] = release_leaks(Dataset(layout.data), ["made_train"], ["made_val"], digests, now)
    assert found.startswith("made_train is not what the model was trained on any more")


def test_a_validation_that_was_cleaned_after_the_evaluation_does_not_vouch_for_it(layout: Layout) -> None:
    """The figures are those of the leaky one, and the files on the disk show no leak."""
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
    *_, version = run_line(made_spec(8, 4), layout)
    val, train = version.directory / "val.json", version.directory / "train.json"
    clean = val.read_text()
    val.write_text(json.dumps(json.loads(clean) + json.loads(train.read_text())))
    publish_changed(version.directory)
    judged = {name: Dataset(layout.data).entry(name).digest for name in ("made_train", "made_val")}
    val.write_text(clean)
    publish_changed(version.directory)
    [found] = release_leaks(Dataset(layout.data), ["made_train"], ["made_val"], judged, judged)
    assert found.startswith("made_val is not what the model was evaluated on any more")


def test_a_release_checks_placeholders_and_counts_of_its_datasets_again(layout: Layout) -> None:
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
    *_, version = run_line(made_spec(8, 4), layout)
    require_sound_versions(Dataset(layout.data), ["made_train", "made_val"])
    publish_changed(version.directory, num_raw=13)
    with pytest.raises(DataError, match="13 raw is not 8 train"):
        require_sound_versions(Dataset(layout.data), ["made_val"])
    rows = json.loads((version.directory / "train.json").read_text())
    rows[0]["images"] = []
    (version.directory / "train.json").write_text(json.dumps(rows))
    publish_changed(version.directory, num_raw=12)
    with pytest.raises(DataError, match="1 placeholders, 0 images"):
        require_sound_versions(Dataset(layout.data), ["made_val"])


def test_a_hub_dataset_for_the_guide_reads_other_rows_than_for_groups(layout: Layout) -> None:
    """The guide's shuffle is over all rows, so both cannot share an ingested file."""
    from mllm_assets.components.assets.dataset import raw_code_version

    source = SourceSpec(kind="huggingface", repo="a/b")
    specs = [replace(made_spec(source=source), split=SplitSpec(strategy=name)) for name in ("guide", "grouped")]
    assert raw_code_version(specs[0]) != raw_code_version(specs[1])
