"""`dataset_info.json`: what LLaMA-Factory reads, other people's entries kept, errors with file and line."""

import json
from pathlib import Path

import pytest

from mllm_assets.data.curate.register import judging_entries, register
from mllm_assets.data.ingest.split_spec import SIDES
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.entries import load_entries, load_entry
from mllm_assets.errors import DataError, IntegrityError, RecipeError
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import made_spec, png, run_line, write_source

pytestmark = pytest.mark.not_fast


def with_line(layout: Layout) -> Path:
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
    return run_line(made_spec(), layout)[2].directory


def test_the_entries_list_every_column_and_tag_that_is_used(layout: Layout) -> None:
    """A present block resets what it does not list to None in LLaMA-Factory."""
    with_line(layout)
    entry = json.loads(layout.dataset_info.read_text())["made_train"]
    assert entry["file_name"] == "made/train.json"
    assert entry["columns"] == {"messages": "messages", "images": "images"}
    assert set(entry["tags"]) == {"role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag"}


def test_other_entries_are_kept(layout: Layout) -> None:
    layout.data.mkdir(parents=True)
    layout.dataset_info.write_text('{"mine": {"file_name": "mine.json", "unknown": [1]}}')
    with_line(layout)
    assert json.loads(layout.dataset_info.read_text())["mine"] == {"file_name": "mine.json", "unknown": [1]}
    assert list(load_entries(layout.data)) == ["mine", "made_train", "made_val", "made_test"]


def test_every_key_of_llamafactory_in_other_entries_is_kept_to_the_byte(layout: Layout) -> None:
    """Keys of `DatasetAttr` (LLaMA-Factory 0.9.5, src/llamafactory/data/parser.py), and two datasets side by side."""
    columns = "system tools images videos audios chosen rejected kto_tag prompt query response history messages".split()
    tags = "role content user assistant observation function system".split()
    mine = {
        "full": {
            "file_name": "mine.parquet", "formatting": "sharegpt", "ranking": True, "subset": "s", "split": "train",
            "folder": "f", "num_samples": 7,
            "columns": {name: f"my {name}" for name in columns}, "tags": {f"{name}_tag": name for name in tags},
        },
        **{key: {key: "a/b"} for key in ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")},
    }  # fmt: skip
    layout.data.mkdir(parents=True)
    layout.dataset_info.write_text(json.dumps(mine))
    with_line(layout)
    run_line(made_spec(name="second"), layout)
    run_line(made_spec(), layout)
    info = json.loads(layout.dataset_info.read_text())
    assert {name: info[name] for name in mine} == mine
    assert list(info) == [*mine, *(f"{name}_{side}" for name in ("made", "second") for side in SIDES)]
    assert load_entry(layout.data, "full").columns["kto_tag"] == "my kto_tag"


def test_a_dataset_without_test_samples_has_no_test_entry_and_judges_by_its_validation(layout: Layout) -> None:
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
    mine = {"mine": {"file_name": "made/val.json", "formatting": "sharegpt"}}
    layout.data.mkdir(parents=True)
    layout.dataset_info.write_text(json.dumps(mine))
    *_, version = run_line(made_spec(), layout)
    assert version.num_test == 2
    assert judging_entries(Dataset(layout.data), ["made_val", "mine", "made_train"]) == ("made_test", "made_train")
    *_, version = run_line(made_spec(10, 2), layout)
    assert (version.num_test, version.test_digest) == (0, "")
    assert not (version.directory / "test.json").exists()
    assert list(load_entries(layout.data)) == ["mine", "made_train", "made_val"]
    assert judging_entries(Dataset(layout.data), ["made_val"]) == ("made_val",)


def test_an_entry_of_someone_else_is_not_overwritten(layout: Layout) -> None:
    layout.data.mkdir(parents=True)
    layout.dataset_info.write_text('{"made_val": {"file_name": "mine.json"}}')
    with pytest.raises(RecipeError, match="the entry 'made_val' belongs to 'mine.json'.*Set train_entry and val_entry"):
        with_line(layout)


def test_the_digest_follows_the_files_and_not_the_other_entries(layout: Layout) -> None:
    version = with_line(layout)
    first = register(made_spec(), layout, version)
    entries = json.loads(layout.dataset_info.read_text())
    layout.dataset_info.write_text(json.dumps({**entries, "mine": {"file_name": "mine.json"}}))
    assert register(made_spec(), layout, version).digest == first.digest
    write_source(layout.root, [(png(n), f"other {n}") for n in range(12)])
    assert register(made_spec(), layout, run_line(made_spec(), layout)[2].directory).digest != first.digest


def test_a_lost_image_is_noticed_before_it_is_registered(layout: Layout) -> None:
    version = with_line(layout)
    sorted(layout.images.iterdir())[0].unlink()
    with pytest.raises(IntegrityError, match="is missing or damaged.*Materialise made/train again"):
        register(made_spec(), layout, version)


def test_an_unknown_entry_is_named_with_the_nearest(layout: Layout) -> None:
    with_line(layout)
    with pytest.raises(RecipeError, match="has no dataset 'made_trian'. The nearest are made_train"):
        load_entry(layout.data, "made_trian")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "a": {},\n "b" 1}', "dataset_info.json, line 3, column 6"),
        ("[]", "expected an object of datasets by name, got list"),
        ('{"a": 1}', "entry 'a' should be an object, got int"),
        ('{"a": {"split": "x"}}', "entry 'a' has no `file_name`"),
        ('{"a": {"file_name": "a.json", "columns": ["messages"]}}', "`columns` of entry 'a' should map names to texts"),
    ],
)
def test_a_wrong_file_is_named_with_its_line_or_entry(layout: Layout, text: str, message: str) -> None:
    layout.data.mkdir(parents=True)
    layout.dataset_info.write_text(text)
    with pytest.raises(DataError) as caught:
        load_entries(layout.data)
    assert message in str(caught.value)


def test_a_missing_file_says_what_makes_it(layout: Layout) -> None:
    with pytest.raises(DataError, match="Make a dataset .mllm-assets run DATASET., or set `dataset_dir`"):
        load_entries(layout.data)
