"""`mllm-assets quality`: the answers, the table and the messages."""

import json
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mllm_assets.cli import main
from mllm_assets.data.curate.splits import split
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.data.ingest.spec import DatasetSpec, QualitySpec, SourceSpec
from mllm_assets.data.ingest.split_spec import SplitSpec
from mllm_assets.data.quality.assess import assess
from mllm_assets.data.quality.browse import FLAGGED, PAGE_SIZE, SampleQuery, browse
from mllm_assets.data.quality.store import QualityStore, table_for, utc_now
from mllm_assets.errors import DataError
from mllm_assets.evaluation.metrics import sample_metrics
from mllm_assets.evaluation.table import store_table, to_table
from mllm_assets.layout import Layout
from tests.unit.data.quality.made_images import encode, picture
from tests.unit.evaluation.made_predictions import prediction  # noqa: E402

pytestmark = pytest.mark.not_fast


def made(name: str = "made", **quality: float) -> DatasetSpec:
    return DatasetSpec(
        name=name,
        source=SourceSpec(kind="parquet", path="source.parquet"),
        prompts=("What?",),
        split=SplitSpec(num_train=6, num_val=2),
        quality=QualitySpec(**quality),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    images = [encode(picture(seed)) for seed in range(8)]
    rows = [(image, f"picture {number}") for number, image in enumerate(images)]
    rows += [(images[1], "Picture 2 "), (encode(picture(9).point(lambda value: value // 12)), "a dark one")]
    rows += [(images[3][:300], "cut off"), (encode(picture(11)), "")]
    table = pa.table({"image": [row[0] for row in rows], "text": [row[1] for row in rows]})
    pq.write_table(table, root / "source.parquet")
    layout = Layout(root)
    for name, run_id in (("made", "run-1"), ("other", "run-2")):
        raw = ingest(made(name), layout)
        quality = assess(made(name), layout, raw.directory, run_id)
        split(made(name), layout, raw.directory, quality.directory, run_id)
    return root


def asked(
    view: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, root: Path, *options: str
) -> str:
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(root))
    assert main(["quality", view, "--dataset", "made", *options]) == 0
    return capsys.readouterr().out


def test_worst_shows_first_what_lies_farthest_below_its_limit(root: Path, capsys, monkeypatch) -> None:
    rows = json.loads(asked("worst", capsys, monkeypatch, root, "--json"))
    assert (rows[0]["issue"], rows[0]["flags"]) == ("image_dark", ["image_dark"])
    assert rows[0]["score"] < rows[0]["score_limit"] == 0.32
    assert rows[0]["margin"] < 1 <= rows[1]["margin"]
    assert [row["margin"] for row in rows] == sorted(row["margin"] for row in rows)
    assert "reject_reason" in rows[0] and "dataset" not in rows[0]


def test_duplicates_and_rejects_and_captions_name_their_samples(root: Path, capsys, monkeypatch) -> None:
    (pair,) = json.loads(asked("duplicates", capsys, monkeypatch, root, "--json"))
    assert pair["kind"] == "exact"
    assert {pair["caption_a"], pair["caption_b"]} == {"picture 1", "Picture 2 "}
    rejects = json.loads(asked("rejects", capsys, monkeypatch, root, "--json"))
    assert [row["reason"] for row in rejects] == ["image_truncated", "caption_empty"]
    captions = json.loads(asked("captions", capsys, monkeypatch, root, "--json", "--limit", "2"))
    assert [row["num_with_this_caption"] for row in captions] == [2, 2]


@pytest.mark.parametrize("view", ["worst", "duplicates", "captions", "rejects"])
def test_every_answer_says_where_its_samples_were_found(view: str, root: Path, capsys, monkeypatch) -> None:
    rows = json.loads(asked(view, capsys, monkeypatch, root, "--json"))
    columns = ("location_a", "location_b") if view == "duplicates" else ("source_location",)
    found = {row[column] for row in rows for column in columns}
    expected = {
        "worst": {f"source.parquet:row {n}" for n in (*range(10), 11)},
        "duplicates": {"source.parquet:row 1", "source.parquet:row 8"},
        "captions": {f"source.parquet:row {n}" for n in range(12)},
        "rejects": {"source.parquet:row 10", "source.parquet:row 11"},
    }
    assert found == expected[view]
    assert "source.parquet:row" in asked(view, capsys, monkeypatch, root)


def test_captions_are_ranked_by_what_is_odd_about_them(tmp_path: Path, capsys, monkeypatch) -> None:
    """Not by alphabet: shared by several, then repeating themselves, then much longer or shorter than the others."""
    usual = [f"{letter} picture of number {n} on a table" for n, letter in enumerate("abcdefghijkl")]
    odd = ["z", "x" * 400, "very good very good very good", "ZZ top", "zz Top "]
    rows = [(encode(picture(seed)), text) for seed, text in enumerate([*usual, *odd])]
    pq.write_table(
        pa.table({"image": [row[0] for row in rows], "text": [row[1] for row in rows]}), tmp_path / "s.parquet"
    )
    spec = replace(made(), source=SourceSpec(kind="parquet", path="s.parquet"))
    assess(spec, Layout(tmp_path), ingest(spec, Layout(tmp_path)).directory, "run-1")
    answers = json.loads(asked("captions", capsys, monkeypatch, tmp_path, "--json"))
    assert [(row["caption"].strip().lower()[:9], row["issue"]) for row in answers[:5]] == [
        ("zz top", "shared"),
        ("zz top", "shared"),
        ("very good", "repetitive"),
        ("z", "short"),
        ("x" * 9, "long"),
    ]
    assert {row["issue"] for row in answers[5:]} == {None}
    assert answers[3]["length_ratio"] < 0.1 < 10 < answers[4]["length_ratio"]


def test_leaks_are_those_of_another_dataset_that_has_the_same_pictures(root: Path, capsys, monkeypatch) -> None:
    """Both datasets put the same groups on the same sides, so the leak is made by hand."""
    assert "is trained on" in asked("leaks", capsys, monkeypatch, root)
    store = QualityStore(Layout(root).quality_db)
    membership = store.query_arrow("SELECT * FROM latest_splits WHERE dataset = 'other' AND split IN ('train', 'val')")
    swapped = [
        {**row, "split": {"train": "val", "val": "train"}[row["split"]], "split_digest": "swapped"}
        for row in membership.to_pylist()
    ]
    store.write({"split_membership": table_for("split_membership", [{**r, "written_at": utc_now()} for r in swapped])})
    rows = json.loads(asked("leaks", capsys, monkeypatch, root, "--json"))
    assert {(row["train_dataset"], row["kind"]) for row in rows} == {("other", "exact")}
    assert len({row["held_out_sample"] for row in rows}) == 2
    assert all(row["held_out_location"].startswith("source.parquet:row ") for row in rows)
    assert [row["train_location"] for row in rows] == [row["held_out_location"] for row in rows]


def test_a_pipe_gets_whole_lines_and_a_limit_counts_them(root: Path, capsys, monkeypatch) -> None:
    text = asked("captions", capsys, monkeypatch, root, "--limit", "3", "--wide")
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 2 + 3
    assert "num_with_this_caption" in lines[0] and "…" not in text


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("view", ["worst", "duplicates", "captions", "rejects"])
def test_a_terminal_gets_a_table_of_a_few_columns(view: str, columns: int, root: Path, capsys, monkeypatch) -> None:
    """Thirteen columns did not fit any terminal, so that each row was a paragraph."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = re.sub(r"\033\[[0-9;]*m", "", asked(view, capsys, monkeypatch, root)).splitlines()
    assert max(map(len, lines)) <= columns
    [ruled] = [line for line in lines if set(line.strip()) == {"─"}]
    assert 3 <= len(re.split(r" {2,}", lines[lines.index(ruled) - 1].strip())) <= 5


def test_an_unknown_dataset_is_answered_with_the_known_ones(root: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(root))
    assert main(["quality", "worst", "--dataset", "mad"]) == 2
    assert "No dataset 'mad'" in (error := capsys.readouterr().err)
    assert "it has: made, other. Did you mean 'made'? To add one: mllm-assets run DATASET/sample_quality" in error


def test_a_root_without_a_database_says_what_makes_one(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(tmp_path))
    assert main(["quality", "worst", "--dataset", "made"]) == 2
    assert "Make a dataset (mllm-assets run DATASET), or set MLLM_ASSETS_ROOT" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("limit", ["0", "-1", "many"])
def test_a_limit_that_is_no_count_is_refused(limit: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["quality", "worst", "--dataset", "made", "--limit", limit])
    assert "at least 1" in capsys.readouterr().err


def test_a_new_threshold_is_a_new_version_and_the_old_one_stays(tmp_path: Path, root: Path) -> None:
    """History: what an earlier run judged is not overwritten, and the same run twice adds nothing."""
    layout = Layout(tmp_path)
    (tmp_path / "source.parquet").write_bytes((root / "source.parquet").read_bytes())
    raw = ingest(made(), layout)
    store = QualityStore(layout.quality_db)
    digests = []
    for run_id, limit in (("run-1", 0.32), ("run-2", 0.0), ("run-2", 0.0)):
        result = assess(made(max_dark_brightness=limit), layout, raw.directory, run_id)
        digests.append(result.digest)
    assert len(set(digests)) == 2
    counts = store.query("SELECT quality_digest AS d, count(*) AS n FROM verdicts GROUP BY ALL")
    assert {row["d"]: row["n"] for row in counts} == dict.fromkeys(digests, 12)
    history = store.query("SELECT run_id, thresholds->>'max_dark_brightness' AS t FROM assessments ORDER BY run_id")
    assert history == [{"run_id": "run-1", "t": "0.32"}, {"run_id": "run-2", "t": "0.0"}]
    assert store.query("SELECT count(*) AS n FROM image_quality") == [{"n": 11}]


def test_hardest_joins_the_newest_evaluation_with_the_quality_of_its_samples(root: Path, capsys, monkeypatch) -> None:
    layout, names = Layout(root), ("old", "new")
    store = QualityStore(layout.quality_db)
    (dark,) = store.query("SELECT sample_id FROM samples WHERE dataset = 'made' AND caption = 'a dark one'")
    ids = [dark["sample_id"], "by-hand"]
    for created_at, run_id in zip((datetime(2026, 1, 1), datetime(2026, 1, 2)), names, strict=True):
        rows = [
            prediction(model, i, sample_id=ids[i], loss_nats=loss + i)
            for model, loss in (("base", 5.0), ("tuned", 1.0 if run_id == "new" else 0.5))
            for i in range(2)
        ]
        said = to_table(rows)
        columns = {"run_id": run_id, "recipe": "pets", "checkpoint_digest": run_id}
        run = {"run_id": run_id, "asset": "pets/predictions", "created_at": created_at}
        store.write(
            {"predictions": store_table(said, sample_metrics(said), **columns), "runs": table_for("runs", [run])}
        )
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(root))
    assert main(["quality", "hardest", "--recipe", "pets", "--json"]) == 0
    external, with_quality = json.loads(capsys.readouterr().out)
    assert (external["sample_id"], external["loss_nats"], external["gain_nats"]) == ("by-hand", 2.0, 4.0)
    assert external["flags"] is None and external["is_right"]
    assert (external["source_location"], with_quality["source_location"]) == (None, "source.parquet:row 9")
    assert (with_quality["loss_nats"], with_quality["worst_issue"]) == (1.0, "image_dark")
    assert with_quality["flags"] == ["image_dark"]


def test_hardest_is_asked_of_a_recipe_that_was_evaluated(root: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(root))
    assert main(["quality", "hardest", "--dataset", "made"]) == 2
    assert "quality hardest needs --recipe NAME. Give it instead of the other one." in capsys.readouterr().err
    assert main(["quality", "hardest", "--recipe", "cats"]) == 2
    assert "No recipe 'cats' in" in (error := capsys.readouterr().err)
    assert "To add one: mllm-assets run RECIPE/predictions" in error


def test_samples_are_browsed_by_split_flag_and_words_with_their_pictures(root: Path) -> None:
    layout = Layout(root)
    everything = browse(layout, SampleQuery(dataset="made"))
    assert everything.num_matching == 12 and {sample.split for sample in everything.samples} >= {"train", "rejected"}
    trained = browse(layout, SampleQuery(dataset="made", split="train")).samples
    assert len(trained) == 6 and all(sample.image and sample.image.is_file() for sample in trained)
    [dark] = browse(layout, SampleQuery(dataset="made", text="A DARK")).samples
    assert dark.flags == ("image_dark",) and dark.sample_id in {
        sample.sample_id for sample in browse(layout, SampleQuery(dataset="made", flag=FLAGGED)).samples
    }
    [cut] = browse(layout, SampleQuery(dataset="made", flag="image_truncated")).samples
    assert (cut.text, cut.split, cut.image) == ("cut off", "rejected", None)
    assert browse(layout, SampleQuery(dataset="made", page=9)).samples == []


@pytest.mark.attack("names")
@pytest.mark.parametrize("words", ["' OR 1=1 --", "%", "_", "$text", '"; DROP TABLE samples; --'])
def test_words_to_search_for_are_only_words(root: Path, words: str) -> None:
    assert browse(Layout(root), SampleQuery(dataset="made", text=words)).num_matching == 0
    with pytest.raises(DataError, match="was not assessed yet"):
        browse(Layout(root), SampleQuery(dataset=words))
    with pytest.raises(DataError, match="cannot be ordered"):
        browse(Layout(root), SampleQuery(dataset="made", order=words))


def test_the_last_pages_of_many_samples_need_no_more_memory_than_the_first(tmp_path: Path) -> None:
    """All texts before the page were sorted, which is more than the database's share of the memory."""
    number, layout, key = 20_000, Layout(tmp_path), {"dataset": "large", "run_id": "run"}
    ids = [f"{index:08}" for index in range(number)]
    judged = key | {"quality_digest": "quality", "raw_digest": "raw"}
    QualityStore(layout.quality_db).write({
        "samples": table_for("samples", [key | {"sample_id": name, "caption": name * 400} for name in ids]),
        "verdicts": table_for(
            "verdicts", [judged | {"sample_id": name, "row_index": index} for index, name in enumerate(ids)]
        ),
        "assessments": table_for("assessments", [judged | {"written_at": utc_now()}]),
    })  # fmt: skip
    last = browse(layout, SampleQuery(dataset="large", page=-(-number // PAGE_SIZE), order="longest text first"))
    assert [sample.sample_id for sample in last.samples] == ids[number // PAGE_SIZE * PAGE_SIZE :]
    assert last.num_matching == number and last.samples[0].text.startswith(last.samples[0].sample_id)
