"""`mllm-assets add-dataset` and `check-data`, as a user calls them."""

import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mllm_assets.cli import main
from mllm_assets.components import ImageTextDataset
from mllm_assets.data.curate import scaffold
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.layout import Layout
from tests.damage import publish_changed
from tests.data_layouts import LAYOUTS
from tests.unit.data.made_datasets import encode, made_spec, picture, png, run_line, write_source

pytestmark = pytest.mark.not_fast

REPOSITORY = Path(__file__).parents[3]
TALK = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}]


@pytest.fixture
def home(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> Path:
    (layout.root / "pyproject.toml").write_text('[tool.dg.project]\nroot_module = "mine"\n')
    monkeypatch.chdir(layout.root)
    monkeypatch.delenv("MLLM_ASSETS_ROOT", raising=False)
    return layout.root


def attributes(home: Path, name: str) -> dict[str, Any]:
    component = yaml.safe_load((home / "mine" / "defs" / "datasets" / name / "defs.yaml").read_text())
    assert component["type"] == "mllm_assets.components.ImageTextDataset"
    return component["attributes"]


def built(home: Path, name: str) -> int:
    """Materialise what the command declared, by the component that reads its YAML; the number of usable rows."""
    spec = ImageTextDataset.model_validate(attributes(home, name)).spec()
    *_, version = run_line(spec, Layout(home))
    assert len(Dataset(home / "data").entry(f"{name}_train").rows) == version.num_train
    return version.num_train + version.num_val


def captioned(folder: Path, count: int = 10) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        (folder / f"{n}.png").write_bytes(png(n))
        (folder / f"{n}.txt").write_text(f"picture {n}")
    return folder


def test_a_folder_with_captions(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = captioned(home / "my" / "Garden Birds")
    (folder / "metadata.md").write_text("notes")
    assert main(["add-dataset", str(folder)]) == 0
    found = attributes(home, "garden_birds")
    assert found["source"] == {"kind": "image_folder", "path": "my/Garden Birds"}
    assert found["split"] == {"num_train": 8, "num_val": 2}
    assert built(home, "garden_birds") == 10
    output = capsys.readouterr().out
    assert output.startswith("10 samples; wrote ")
    assert "mllm-assets run garden_birds" in output
    assert "note: 'Garden Birds' is called garden_birds here" in output


def test_the_commands_that_it_prints_make_a_recipe_on_the_new_entries(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reader was told to put two keys into "a recipe", and had none."""
    captioned(home / "birds")
    (home / "configs").mkdir(exist_ok=True)
    shutil.copy(REPOSITORY / "configs" / "emoji_sft.yaml", home / "configs")
    assert main(["add-dataset", "birds"]) == 0
    [command] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  sed ")]
    subprocess.run(command, shell=True, cwd=home, check=True)
    recipe = yaml.safe_load((home / "configs" / "birds_sft.yaml").read_text())
    found = (recipe["dataset"], recipe["eval_dataset"], recipe["output_dir"])
    assert found == ("birds_train", "birds_val", "outputs/birds_sft")


def test_folders_by_class(home: Path) -> None:
    for n in range(10):
        path = home / "birds" / ("robin" if n % 2 else "house_wren") / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(n))
    assert main(["add-dataset", "birds", "--name", "Wild birds"]) == 0
    assert attributes(home, "wild_birds")["answer"] == "{label}"
    assert built(home, "wild_birds") == 10
    assert {row.label for row in Dataset(home / "data").entry("wild_birds_train").rows} == {"robin", "house wren"}


def test_a_folder_that_is_split_already(home: Path) -> None:
    captioned(home / "birds" / "train", 6)
    (home / "birds" / "validation").mkdir()
    for n in range(20, 23):
        (home / "birds" / "validation" / f"{n}.png").write_bytes(png(n))
        (home / "birds" / "validation" / f"{n}.txt").write_text("held")
    assert main(["add-dataset", "birds"]) == 0
    assert attributes(home, "birds")["source"]["val_split"] == "validation"
    assert built(home, "birds") == 9


def test_metadata_and_what_will_be_rejected(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = captioned(home / "birds")
    lines = [{"file_name": f"{n}.png", "description": f"bird {n}"} for n in range(12)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["add-dataset", "birds"]) == 0
    assert attributes(home, "birds")["source"]["caption_column"] == "description"
    assert "  2 will be rejected: image_missing (first: metadata.jsonl:11, 10.png)\n" in capsys.readouterr().out
    assert built(home, "birds") == 10


def brighter(n: int) -> bytes:
    """Pictures of one look, each of other bytes."""
    return encode(picture(0).point(lambda value: min(value + n, 255)))


def test_what_is_foretold_is_what_happens(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken, empty and tiny pictures, bad captions, repeats and near-duplicates: the split can be met without them."""
    folder = captioned(home / "birds", 40)
    for n in range(30, 34):
        (folder / f"{n}.png").write_bytes(png(n)[:300])
    (folder / "34.png").write_bytes(b"")
    (folder / "35.png").write_bytes(png(35, 4))
    (folder / "36.txt").write_text("see <start_of_turn> there")
    (folder / "37.txt").unlink()
    for suffix in ("png", "txt"):
        shutil.copy(folder / f"0.{suffix}", folder / f"38.{suffix}")
    for n in range(1, 9):  # nine of one look, which stay together
        (folder / f"{n}.png").write_bytes(brighter(n))
    assert main(["add-dataset", "birds"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("40 samples; wrote ")
    assert "  4 will be rejected: image_truncated (first: 30.png)\n" in output
    assert "  1 repeat another's images and texts" in output
    spec = ImageTextDataset.model_validate(attributes(home, "birds")).spec()
    _, quality, version = run_line(spec, Layout(home))
    assert quality.num_duplicates >= 8
    found = re.findall(r"  (\d+) will be rejected: (\w+)", output)
    assert {reason: int(count) for count, reason in found} == version.reject_reasons
    assert version.num_unused >= 1 and version.num_rejected == 8
    assert (version.num_train, version.num_val) == (spec.split.num_train, spec.split.num_val)
    for line in (
        "  mllm-assets check-graph\n",
        "  mllm-assets run birds\n",
        "  mllm-assets quality rejects --dataset birds\n",
        "  mllm-assets check-data data\n",
        "`dataset: birds_train` and `eval_dataset: birds_val`",
    ):
        assert line in output


def test_of_many_samples_some_that_are_spread_over_all_are_decoded(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaffold, "MAX_CHECKED", 20)
    folder = captioned(home / "birds", 40)
    for n in range(10, 30):  # by name 10.png .. 29.png lie together
        (folder / f"{n}.png").write_bytes(b"no picture")
    assert main(["add-dataset", "birds"]) == 0
    assert "  10 of the 20 checked will be rejected: image_unreadable (first: " in capsys.readouterr().out
    split = attributes(home, "birds")["split"]
    assert 15 <= split["num_train"] + split["num_val"] <= 20


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([b"no picture"] * 3, "0 of 3 samples can be used, but a dataset needs at least 2. Fix the files, or add "
                              "others.\n  3 image_unreadable, the first: 0.png"),
        ([brighter(n) for n in range(3)], "its 3 usable samples all look alike"),
    ],
)  # fmt: skip
def test_pictures_that_cannot_be_split_are_refused(
    home: Path, capsys: pytest.CaptureFixture[str], contents: list[bytes], message: str
) -> None:
    folder = captioned(home / "birds", 3)
    for n, content in enumerate(contents):
        (folder / f"{n}.png").write_bytes(content)
    assert main(["add-dataset", "birds"]) == 2
    assert message in capsys.readouterr().err
    assert not (home / "mine").exists()


def test_tables_and_tars_and_a_llamafactory_directory(home: Path) -> None:
    (home / "tables").mkdir()
    table = pa.table({"img": [png(n) for n in range(10)], "Caption": [f"picture {n}" for n in range(10)]})
    pq.write_table(table, home / "tables" / "a.parquet")
    (home / "tars").mkdir()
    with tarfile.open(home / "tars" / "a.tar", "w") as archive:
        for n in range(10):
            for suffix, data in (("png", png(n)), ("txt", b"picture")):
                member = tarfile.TarInfo(f"{n}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    write_source(home, [(png(n), f"picture {n}") for n in range(10)])
    run_line(made_spec(8, 2, name="old"), Layout(home))
    (home / "data").rename(home / "theirs")
    for name, kind in (("tables", "table"), ("tars", "webdataset"), ("theirs", "llamafactory")):
        assert main(["add-dataset", name]) == 0
        assert attributes(home, name)["source"]["kind"] == kind
        assert built(home, name) == 10
    assert attributes(home, "theirs")["source"] | {"path": ""} == {
        "kind": "llamafactory", "path": "", "split": "old_train", "val_split": "old_val"
    }  # fmt: skip


def test_a_folder_elsewhere_is_named_by_its_absolute_path(home: Path, tmp_path_factory: Any) -> None:
    folder = captioned(tmp_path_factory.mktemp("elsewhere") / "birds")
    assert main(["add-dataset", str(folder)]) == 0
    assert attributes(home, "birds")["source"]["path"] == str(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "There is no folder gone"),
        (["a_file"], "a_file is a file. Name the folder that it is in"),
        (["empty"], "holds no images, no metadata.jsonl"),
        (["bare"], "none of its 2 images has a caption or a class. Put a text file next to each image"),
        (["birds", "--name", "taken"], "exists already. Edit it, or give another name with --name"),
    ],
)
def test_what_cannot_be_added_is_said_and_leaves_nothing(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (home / "empty").mkdir()
    (home / "bare").mkdir()
    (home / "a_file").touch()
    for n in range(2):
        (home / "bare" / f"{n}.png").write_bytes(png(n))
    captioned(home / "birds")
    taken = home / "mine" / "defs" / "datasets" / "taken"
    taken.mkdir(parents=True)
    (taken / "defs.yaml").write_text("mine")
    assert main(["add-dataset", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in taken.parent.iterdir()] == ["taken"]
    assert (taken / "defs.yaml").read_text() == "mine"


def test_outside_a_project_it_says_where_to_go(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "pyproject.toml").unlink()
    captioned(home / "birds")
    assert main(["add-dataset", "birds"]) == 2
    assert "names no Dagster project" in capsys.readouterr().err


def test_every_file_is_accounted_for_and_the_first_rows_are_shown(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten of 28 phone pictures vanished without a word."""
    LAYOUTS["texts_beside_phone_pictures"](home / "phone")
    (home / "phone" / "alone.png").write_bytes(png(20))
    (home / "phone" / ".hidden").touch()
    (home / "phone" / "IMG 6.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    (home / "phone" / "IMG 6.txt").write_text("a picture of a phone")
    assert main(["add-dataset", "phone"]) == 0
    output = capsys.readouterr().out
    assert "found images with 7 text files; answer: the text file of each image\n" in output
    assert "  17 files: 15 used (8 images), 0 images without a row, 1 not read, 1 hidden\n" in output
    assert "  not read: scan.pdf: PDF\n" in output
    assert (
        "image_format_unsupported (first: IMG 6.HEIC, it is HEIF (`pip install pillow-heif` lets it be read))" in output
    )
    assert "  IMG 0.PNG\n    user: <image>Describe this image.\n    assistant: A lamp, a kite and 0 stones\n" in output


def test_rows_of_text_only_and_the_sources_ids_go_through_the_whole_line(home: Path) -> None:
    LAYOUTS["llava_with_rows_of_text"](home / "mix")
    assert main(["add-dataset", "mix"]) == 0
    assert built(home, "mix") == 7
    published = [
        row for side in ("train", "val") for row in json.loads((home / "data" / "mix" / f"{side}.json").read_text())
    ]
    talks = {row["original_id"]: (row["images"], [turn["content"] for turn in row["messages"]]) for row in published}
    assert talks["text"] == ([], ["Say hello.", "Hello."])
    assert sorted(talks) == [*(f"{n:06}" for n in range(6)), "text"]
    store = QualityStore(Layout(home).quality_db)
    ids = store.query("SELECT source_id FROM sample_versions ORDER BY row_index")
    assert [row["source_id"] for row in ids] == [*(f"{n:06}" for n in range(6)), "text"]
    assert main(["check-data", "data"]) == 0


def test_check_data_warns_of_an_answer_without_text(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was "fine", and teaches the model to say nothing."""
    write_source(home, [(png(n), f"picture {n}") for n in range(4)])
    run_line(made_spec(3, 1), Layout(home))
    path = home / "data" / "made" / "train.json"
    rows = json.loads(path.read_text())
    rows[1]["messages"][1]["content"] = " \n"
    path.write_text(json.dumps(rows))
    publish_changed((home / "data" / "made").resolve())
    assert main(["check-data", "data"]) == 0, "it can be trained on"
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "made_train: 3 rows, 3 images: 1 warning"
    row_id = Dataset(home / "data").entry("made_train").rows[1].id
    assert said[1].startswith(f"  made/train.json ({row_id}), message 1: the answer is empty, and teaches the model to")


def test_check_data_finds_every_problem_of_every_entry(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(home, [(png(n), f"picture {n}") for n in range(10)])
    run_line(made_spec(8, 2), Layout(home))
    assert main(["check-data", "data"]) == 0
    assert capsys.readouterr().out == "made_train: 8 rows, 8 images: fine\nmade_val: 2 rows, 2 images: fine\n"
    rows = json.loads((home / "data" / "made" / "train.json").read_text())
    (home / "data" / "broken.png").write_bytes(png(3)[:100])
    rows[0]["images"] = ["gone.png"]
    rows[1]["messages"] = rows[1]["messages"][:1]
    rows[2]["images"] = ["broken.png"]
    rows[3]["messages"][1]["content"] = "an <end_of_turn> too early"
    (home / "data" / "mine.json").write_text(json.dumps(rows))
    info = json.loads((home / "data" / "dataset_info.json").read_text())
    info["mine"] = {**info["made_train"], "file_name": "mine.json"}
    info["hub"] = {"hf_hub_url": "a/b"}
    (home / "data" / "dataset_info.json").write_text(json.dumps(info))
    assert main(["check-data", "data"]) == 2
    output = capsys.readouterr().out
    assert "made_train: 8 rows, 8 images: fine" in output and "mine: 8 rows, 6 images: 4 problems" in output
    for text in ("there is no image", "the last message is not the assistant's", "image_truncated", "control token"):
        assert text in output
    assert "hub: 0 rows, 0 images: 1 problem\n  Entry 'hub' sets `hf_hub_url`" in output
    assert main(["check-data", "data", "--limit", "1"]) == 2
    assert "  and 3 more (--limit shows them)" in capsys.readouterr().out
    assert main(["check-data", "tables"]) == 2
    assert "There is no tables/dataset_info.json" in capsys.readouterr().err
