"""Datasets that one recipe mixes: a picture of one's validation may be in the other's training."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from mllm_assets.artifacts import write_manifest
from mllm_assets.cli import main
from mllm_assets.data.curate.leaks import Stage, datasets_share_no_image, release_leaks, stages_of, training_lineage
from mllm_assets.data.ingest.spec import DecodeLimits
from mllm_assets.data.quality import decoding
from mllm_assets.data.quality.probes import ImageMeasurement
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import encode, made_spec, picture, png, run_line, write_source

pytestmark = pytest.mark.not_fast


@pytest.fixture
def two(layout: Layout) -> Layout:
    """`left` holds pictures 0 to 11; `right` 6 to 17, smaller and as JPEG."""
    write_source(layout.root, [(png(n, 96), f"picture {n}") for n in range(12)])
    run_line(made_spec(8, 4, name="left"), layout)
    write_source(layout.root, [(encode(picture(n, 64), "JPEG", quality=80), f"picture {n}") for n in range(6, 18)])
    run_line(made_spec(6, 6, name="right", seed=3), layout)
    return layout


def shown(layout: Layout, entry: str) -> set[str]:
    name, side = entry.split("_")
    rows = json.loads((layout.data / name / f"{side}.json").read_text())
    return {row["messages"][-1]["content"] for row in rows}


def test_a_near_duplicate_in_the_other_datasets_validation_is_found(two: Layout) -> None:
    shared = shown(two, "left_train") & shown(two, "right_val")
    assert shared, "the test needs some"
    outcome = datasets_share_no_image(Dataset(two.data), ["left_train"], ["right_val"])
    assert not outcome.passed
    assert outcome.metadata["num_problems"] == len(shared)
    assert (
        " of left_train ~ images/" in outcome.description and "Take one of the two entries out" in outcome.description
    )


def test_one_dataset_alone_is_not_measured_again(two: Layout) -> None:
    outcome = datasets_share_no_image(Dataset(two.data), ["left_train"], ["left_val"])
    assert outcome.passed and outcome.metadata["num_images"] == 0


def test_datasets_without_a_common_picture_pass(layout: Layout) -> None:
    for name, first in (("left", 0), ("right", 20)):
        write_source(layout.root, [(png(n), f"picture {n}") for n in range(first, first + 12)])
        run_line(made_spec(8, 4, name=name), layout)
    outcome = datasets_share_no_image(Dataset(layout.data), ["left_train", "right_train"], ["left_val", "right_val"])
    assert outcome.passed
    assert outcome.metadata["num_images"] == 24


def test_entries_that_a_person_wrote_are_compared_too(two: Layout) -> None:
    """Nobody made their split, so nobody has looked."""
    info = json.loads(two.dataset_info.read_text())
    rows = json.loads((two.data / "left" / "train.json").read_text())
    for side, part in (("train", rows), ("val", rows[:1])):
        (two.data / f"mine_{side}.json").write_text(json.dumps(part))
        info[f"mine_{side}"] = {**info["left_train"], "file_name": f"mine_{side}.json"}
    two.dataset_info.write_text(json.dumps(info))
    outcome = datasets_share_no_image(Dataset(two.data), ["mine_train"], ["mine_val"])
    assert outcome.metadata["num_problems"] == 1


def test_a_video_under_another_name_is_found_by_its_bytes(tmp_path: Path) -> None:
    """Videos were no pictures, and what only they show could be trained on and evaluated on."""
    info = {"formatting": "sharegpt", "columns": {"messages": "messages", "videos": "videos"}}
    turns = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "A square."}]
    for entry, name, content in (("mine", "a.mp4", b"1"), ("held", "b.mp4", b"1"), ("other", "c.mp4", b"2")):
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{entry}.json").write_text(json.dumps([{"messages": turns, "videos": [name]}]))
    names = {entry: {**info, "file_name": f"{entry}.json"} for entry in ("mine", "held", "other")}
    (tmp_path / "dataset_info.json").write_text(json.dumps(names))
    outcome = datasets_share_no_image(Dataset(tmp_path), ["mine"], ["held"])
    assert not outcome.passed and "a.mp4 of mine ~ b.mp4 of held" in outcome.description
    assert datasets_share_no_image(Dataset(tmp_path), ["mine"], ["other"]).passed


def test_the_files_decide_and_not_the_table(two: Layout) -> None:
    """Someone copies a picture over another: no table knows."""
    rows = {side: json.loads((two.data / "left" / f"{side}.json").read_text()) for side in ("train", "val")}
    write_source(two.root, [(png(n), f"picture {n}") for n in range(40, 52)])
    run_line(made_spec(8, 4, name="third"), two)
    assert datasets_share_no_image(Dataset(two.data), ["left_train"], ["third_val"]).passed
    target: Path = two.data / json.loads((two.data / "third" / "val.json").read_text())[0]["images"][0]
    target.write_bytes((two.data / rows["train"][0]["images"][0]).read_bytes())
    assert not datasets_share_no_image(Dataset(two.data), ["left_train"], ["third_val"]).passed


def test_what_was_measured_once_is_not_decoded_again(two: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    store = QualityStore(two.quality_db)
    decoded: list[bytes] = []
    measure = decoding.measure_images

    def counted(images: Iterable[bytes], limits: DecodeLimits) -> Iterator[ImageMeasurement]:
        return measure((decoded.append(data) or data for data in images), limits)

    monkeypatch.setattr(decoding, "measure_images", counted)
    assert not datasets_share_no_image(Dataset(two.data), ["left_train"], ["right_val"], store=store).passed
    assert decoded == []


def stage(layout: Layout, *entries: str) -> Stage:
    digests = {entry: Dataset(layout.data).entry(entry).digest for entry in entries}
    return Stage(recipe="first", fingerprint="f" * 16, data_dir=layout.data, entries=digests)


def test_what_an_earlier_stage_trained_on_must_not_be_evaluated_on(two: Layout) -> None:
    """The second recipe's own entries are of one dataset, and its base model has seen the other one."""
    shared = shown(two, "left_train") & shown(two, "right_val")
    outcome = datasets_share_no_image(
        Dataset(two.data), ["right_train"], ["right_val"], stages=[stage(two, "left_train")]
    )
    assert not outcome.passed and outcome.metadata["num_problems"] == len(shared)
    assert outcome.description.startswith(
        f"{len(shared)} pictures that are evaluated on were trained on in an earlier stage, the first: images/"
    )
    assert " of left_train, which the earlier stage first (run ffffffffffffffff) trained on, ~ images/" in (
        outcome.description
    )
    assert "start from another model" in outcome.description
    assert datasets_share_no_image(
        Dataset(two.data), ["right_train"], ["right_val"], stages=[stage(two, "right_train")]
    ).passed


def test_an_earlier_stage_may_not_train_on_the_very_entry_that_is_evaluated(two: Layout) -> None:
    outcome = datasets_share_no_image(Dataset(two.data), ["left_train"], ["left_val"], stages=[stage(two, "left_val")])
    assert outcome.metadata["num_problems"] == 4


def test_an_earlier_stages_entry_that_is_gone_is_named_and_stops_a_release_only(two: Layout) -> None:
    lost = stage(two, "left_train")
    info = json.loads(two.dataset_info.read_text())
    del info["left_train"]
    two.dataset_info.write_text(json.dumps(info))
    outcome = datasets_share_no_image(Dataset(two.data), ["right_train"], ["right_val"], stages=[lost])
    assert outcome.passed
    assert "cannot be read any more: left_train of the earlier stage first (run ffffffffffffffff)." in (
        outcome.description
    )
    now = {entry: Dataset(two.data).entry(entry).digest for entry in ("right_train", "right_val")}
    assert release_leaks(Dataset(two.data), ["right_train"], ["right_val"], now, now) == []
    [text] = release_leaks(Dataset(two.data), ["right_train"], ["right_val"], now, now, stages=[lost])
    assert text.startswith("left_train is not what the earlier stage first (run ffffffffffffffff) was trained on any")
    assert text.endswith("materialise the checkpoint of first, then this one, again.")


def test_a_release_looks_at_what_earlier_stages_trained_on(two: Layout) -> None:
    now = {entry: Dataset(two.data).entry(entry).digest for entry in ("right_train", "right_val")}
    stages = [stage(two, "left_train")]
    [text] = release_leaks(Dataset(two.data), ["right_train"], ["right_val"], now, now, stages=stages)
    assert "were trained on in an earlier stage" in text


def test_a_model_says_which_stages_it_went_through(layout: Layout) -> None:
    first = Stage(recipe="first", fingerprint="1", data_dir=layout.data, entries={"a": "d"})
    second = Stage(recipe="second", fingerprint="2", data_dir=layout.data, entries={"b": "e"})
    run, release = (layout.root / name for name in ("outputs/second/2", "releases/second/v1"))
    line = {"stages": [stage.to_dict(layout.root) for stage in (first, second)]}
    for directory in (run, release):
        (directory / "model").mkdir(parents=True)
        write_manifest(directory, line)
    assert line["stages"][0]["dataset_dir"] == "data", "a project may move"
    assert training_lineage(run / "model", layout.root) == training_lineage(release, layout.root) == [first, second]
    assert training_lineage(layout.root / "nowhere", layout.root) == stages_of({}, layout.root) == []


def test_training_from_the_command_line_warns_in_the_same_words(
    two: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the asset looked; here the recipe's model is missing, so that nothing is trained."""
    recipe = two.root / "r.yaml"
    recipe.write_text(
        "model_name_or_path: nowhere\nstage: sft\ndo_train: true\nfinetuning_type: lora\ntemplate: gemma3\n"
        "dataset: left_train\neval_dataset: right_val\noutput_dir: saves/r\n"
    )
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(two.root))
    assert main(["train", str(recipe)]) == 2
    warning, error = capsys.readouterr().err.strip().split("\n", 1)
    expected = datasets_share_no_image(Dataset(two.data), ["left_train"], ["right_val"]).description
    assert warning == f"warning: r.yaml: {expected}"
    assert "nowhere" in error
