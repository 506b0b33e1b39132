"""What people decided about samples changes their rows: no side, no prompt, no other sample; and all can be undone."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mllm_assets.artifacts import read_manifest
from mllm_assets.data.curate.corrected import GONE, OTHER_ANSWER, answer_of, find_source, settle, spec_of, with_answer
from mllm_assets.data.curate.corrections import (
    Correction,
    add_corrections,
    content_id,
    corrections_digest,
    in_force,
    read_corrections,
)
from mllm_assets.data.curate.register import register
from mllm_assets.data.curate.splits import SplitResult, split
from mllm_assets.data.curate.uncorrected import Uncorrected, publish_uncorrected
from mllm_assets.data.ingest.raw_files import read_texts
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec, as_json
from mllm_assets.data.quality.assess import assess
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.sharegpt.dataset import Dataset, Entry
from mllm_assets.errors import DataError, IntegrityError, MllmAssetsError
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import made_spec, png, write_source

pytestmark = pytest.mark.not_fast
SAMPLE = "0123456789abcdef"


def decision(sample_id: str, action: Any = "relabel", **values: str) -> Correction:
    values |= {"new": values.get("new", "right")} if action == "relabel" else {}
    return Correction(sample_id=sample_id, action=action, who="Ada", **values)


def decide(layout: Layout, *decisions: Correction, name: str = "made") -> None:
    add_corrections(layout, name, decisions)


def line(spec: DatasetSpec, layout: Layout) -> SplitResult:
    raw = ingest(spec, layout)
    quality = assess(spec, layout, raw.directory, "run-1")
    settled = settle(spec, layout, raw.directory)
    return split(spec, layout, raw.directory, quality.directory, "run-1", settled.directory)


def rows(version: SplitResult) -> dict[str, tuple[str, dict[str, Any]]]:
    """The rows of all sides by id, each with its side."""
    found = {}
    for side in ("train", "val", "test"):
        path = version.directory / f"{side}.json"
        found |= {row["id"]: (side, row) for row in (json.loads(path.read_text()) if path.is_file() else [])}
    return found


def answer(row: dict[str, Any]) -> str:
    return row["messages"][-1]["content"]


@pytest.fixture
def made(layout: Layout) -> DatasetSpec:
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(40)])
    return made_spec(12, 4, num_test=4)


def test_what_is_published_is_named_by_all_that_it_says(made: DatasetSpec, layout: Layout) -> None:
    """Another machine with another split published something else under the same name, and the store refused it."""
    raw = ingest(made, layout).directory
    other = replace(made, split=replace(made.split, num_train=3))
    ours, theirs = (settle(one, layout, raw).directory for one in (made, other))
    assert ours != theirs and ours == settle(made, layout, raw).directory
    assert [spec_of(read_manifest(path)["spec"]) for path in (ours, theirs)] == [made, other]


def test_a_correction_changes_its_row_and_moves_nothing_and_undo_gives_the_same_bytes_again(
    made: DatasetSpec, layout: Layout
) -> None:
    before = line(made, layout)
    sides = rows(before)
    of = {side: [key for key, (its, _) in sides.items() if its == side] for side in ("train", "val", "test")}
    other, dropped, tested = of["train"][1], of["train"][2], of["test"][0]
    old = {key: answer(sides[key][1]) for key in sides}
    decide(layout, decision(other, old=old[other]), decision(tested, old=old[tested], new="tested"))
    decide(layout, decision(dropped, "drop", old=old[dropped]), decision(of["val"][0], "keep"))
    after = line(made, layout)
    found = rows(after)
    assert {key: side for key, (side, _) in found.items()} == {
        key: side for key, (side, _) in sides.items() if key != dropped
    }
    changed = {key: answer(row) for key, (_, row) in found.items() if row != sides[key][1]}
    assert changed == {other: "right", tested: "tested"}, "the prompts of the others, given in turn, stay too"
    assert (after.num_corrected, after.unused_reasons["dropped"]) == (2, 1)
    assert after.num_raw == after.num_train + after.num_val + after.num_test + after.num_unused + after.num_rejected
    assert after.digest != before.digest and after.val_digest == before.val_digest
    stored = QualityStore(layout.quality_db).query("SELECT sample_id FROM latest_splits WHERE reason = 'dropped'")
    assert stored == [{"sample_id": dropped}]

    decide(layout, *(decision(key, "undo") for key in (other, dropped, tested)))
    assert line(made, layout).digest == before.digest
    assert len(read_corrections(layout, "made")) == 7, "nothing is ever deleted"


def test_the_rows_without_corrections_are_those_of_before_and_the_dataset_stays_as_it_is(
    made: DatasetSpec, layout: Layout
) -> None:
    def entry(name: str) -> Entry:
        return Dataset(layout.data, read_part=None).entry(name)

    before = line(made, layout)
    register(made, layout, before.directory)
    old = {key: answer(row) for key, (side, row) in rows(before).items() if side == "train"}
    assert publish_uncorrected(layout, entry(made.train_entry)) is None
    other, dropped, *_ = old
    decide(layout, decision(other, old=old[other]), decision(dropped, "drop", old=old[dropped]))
    after = line(made, layout)
    register(made, layout, after.directory)
    found = publish_uncorrected(layout, entry(made.train_entry))
    assert found == Uncorrected(entry=f"{made.train_entry}_uncorrected", num_changed=1, num_dropped=1)
    assert {row.id: row.messages[-1].content for row in entry(found.entry).each()} == old
    assert entry(made.train_entry).version == after.directory.resolve()
    stored = QualityStore(layout.quality_db).query("SELECT sample_id FROM latest_splits WHERE reason = 'dropped'")
    assert stored == [{"sample_id": dropped}], "the splits in the database are those that are trained on"


def test_sides_do_not_depend_on_when_a_sample_was_dropped(made: DatasetSpec, layout: Layout, tmp_path: Path) -> None:
    """A sample that is dropped before the first split would let others into its place, and come back elsewhere."""
    sides = {key: side for key, (side, _) in rows(line(made, layout)).items()}
    other = Layout(tmp_path / "other")
    write_source(other.root, [(png(n), f"picture {n}") for n in range(40)])
    gone = sorted(sides)[:5]
    decide(other, *(decision(key, "drop") for key in gone))
    found = {key: side for key, (side, _) in rows(line(made, other)).items()}
    assert found == {key: side for key, side in sides.items() if key not in gone}


def test_a_correction_survives_a_new_version_of_the_source_and_one_that_does_not_fit_is_named(
    made: DatasetSpec, layout: Layout
) -> None:
    first = rows(line(made, layout))
    train = [key for key, (side, _) in first.items() if side == "train"]
    old = {key: answer(first[key][1]) for key in train}
    decide(layout, *(decision(key, old=old[key]) for key in train[:2]), decision(train[2], old="another"))
    again = [(png(n), f"picture {n}") for n in range(45) if f"picture {n}" != old[train[1]]]
    write_source(layout.root, [*again, (png(60), "new")][::-1])
    found = rows(line(made, layout))
    assert answer(found[train[0]][1]) == "right" and train[1] not in found
    assert answer(found[train[2]][1]) == old[train[2]]
    result = settle(made, layout, ingest(made, layout).directory)
    assert (result.num_relabelled, result.num_dropped, result.num_kept) == (1, 0, 0)
    assert {one.sample_id: why for one, why in result.unmatched} == {train[1]: GONE, train[2]: OTHER_ANSWER}


def test_a_decision_that_changes_nothing_makes_nothing_outdated(made: DatasetSpec, layout: Layout) -> None:
    raw = ingest(made, layout).directory
    sample_id = next(read_texts(raw, ["sample_id"]))["sample_id"]
    before = settle(made, layout, raw)
    decide(layout, decision(sample_id, "keep"))
    kept = settle(made, layout, raw)
    assert (kept.digest, kept.num_kept) == (before.digest, 1) and kept.decisions_digest != before.decisions_digest
    decide(layout, decision(sample_id, "drop"))
    assert settle(made, layout, raw).digest != before.digest
    assert find_source(layout, "made") == (made, raw)


def test_a_label_that_was_missing_makes_its_sample_usable(layout: Layout) -> None:
    rows_of_source = [(png(n), f"picture {n}") for n in range(12)] + [(png(30), ""), (png(31), None)]
    write_source(layout.root, rows_of_source)
    spec = made_spec(14, 2, num_test=0)
    before = line(spec, layout)
    raw = ingest(spec, layout).directory
    empty = [row["sample_id"] for row in read_texts(raw, ["sample_id", "caption"]) if not row["caption"]]
    assert before.reject_reasons == {"caption_empty": 2}
    decide(layout, decision(empty[0], new="a face"))
    after = line(spec, layout)
    assert after.reject_reasons == {"caption_empty": 1} and after.num_raw == before.num_raw
    side, row = rows(after)[empty[0]]
    assert (side, answer(row)) == ("train", "a face")
    assert {key: side for key, (side, _) in rows(before).items()}.items() <= {
        key: side for key, (side, _) in rows(after).items()
    }.items()


def test_a_changed_copy_says_what_its_sample_says(layout: Layout) -> None:
    write_source(layout.root, [(png(n), "thing") for n in range(8)])
    spec = made_spec(6, 2, num_test=0, augment=("flip",))
    first = next(key for key, (side, _) in rows(line(spec, layout)).items() if side == "train")
    decide(layout, decision(first, old="thing", new="other"), decision(f"{'0' * 16}", "drop"))
    found = rows(line(spec, layout))
    assert answer(found[first][1]) == answer(found[f"{first}+flip"][1]) == "other"


def test_every_sample_of_a_side_cannot_be_dropped(made: DatasetSpec, layout: Layout) -> None:
    found = rows(line(made, layout))
    decide(layout, *(decision(key, "drop") for key, (side, _) in found.items() if side != "train"))
    with pytest.raises(DataError, match="every sample of val was dropped.*review made undo"):
        line(made, layout)


TALK = [{"role": "user", "content": "<image>a?"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"}, {"role": "assistant", "content": "d"}]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "sample", "old", "changed"),
    [
        ({"answer": "It is {caption}."}, {"caption": "a cat"}, "a cat", {"caption": "new"}),
        ({"answer": "{label}"}, {"label": "old_label"}, "old label", {"label": "new"}),
        ({"answer": "{breed}"}, {"fields": '{"breed": "pug", "age": "3"}'}, "pug",
         {"fields": '{"breed": "new", "age": "3"}'}),
        ({"answer": "{label}: {caption}"}, {"label": "dog", "caption": "a pug"}, "dog: a pug",
         {"label": None, "corrected_answer": "new"}),
        ({}, {"messages": json.dumps(TALK), "caption": "b\nd"}, "d",
         {"messages": json.dumps([*TALK[:3], {"role": "assistant", "content": "new"}]), "caption": "b\nnew"}),
    ],
)  # fmt: skip
def test_what_is_corrected_is_what_the_model_is_to_answer(
    fields: dict[str, Any], sample: dict[str, Any], old: str, changed: dict[str, Any]
) -> None:
    spec = made_spec(source=SourceSpec(kind="parquet", path="x", label_column="label"), **fields)
    row = {"caption": None, "label": None, "messages": None, "fields": None, **sample}
    assert answer_of(row, spec) == old
    assert with_answer(row, "new", spec) == {**row, **changed}
    assert spec_of(as_json(spec)) == spec


def test_an_answer_that_this_dataset_cannot_train_on_is_named_with_how_to_take_it_back(
    made: DatasetSpec, layout: Layout
) -> None:
    raw = ingest(made, layout).directory
    first = next(read_texts(raw, ["sample_id", "caption"]))
    decide(layout, decision(first["sample_id"], old=first["caption"], new="far too long"))
    strict = replace(made, quality=replace(made.quality, max_caption_chars=10))
    with pytest.raises(
        DataError, match=rf"the new answer of Ada.*caption_too_long.*review made undo {first['sample_id']}"
    ):
        settle(strict, layout, raw)


def test_the_last_decision_that_was_not_taken_back_counts(layout: Layout) -> None:
    for one in (decision(SAMPLE, new="a"), decision(SAMPLE, "drop"), decision(SAMPLE, "undo")):
        decide(layout, one)
    assert in_force(read_corrections(layout, "made"))[SAMPLE].new == "a"
    decide(layout, decision(SAMPLE, "undo"))
    assert in_force(read_corrections(layout, "made")) == {}
    before = corrections_digest(layout, "made")
    with pytest.raises(DataError, match="nothing to undo"):
        decide(layout, decision(SAMPLE, "drop"), decision(SAMPLE, "undo"), decision(SAMPLE, "undo"))
    assert corrections_digest(layout, "made") == before, "all or none"
    assert content_id(f"{SAMPLE}-2") == content_id(f"{SAMPLE}+flip") == SAMPLE


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"who": " "}, "give --who NAME"),
        ({"who": "A\x1b[31mda"}, "who must be at most 100 printable"),
        ({"why": "x" * 2001}, "why must be at most 2,000"),
        ({"sample_id": "../../etc"}, "not the content of a sample"),
        ({"action": "burn"}, "expected one of relabel, drop, keep, undo"),
        ({"new": " "}, "relabel needs the new answer"),
        ({"action": "drop"}, "nothing else has one"),
        ({"new": "a<end_of_turn>b"}, "cannot be trained on: control token"),
        ({"new": "a\x1b[2J"}, "control character"),
        ({"new": "\ud83d"}, "undecodable"),
        ({"new": "x" * 70_000}, "may have 65,536 characters"),
    ],
)
def test_a_decision_that_cannot_be_trained_on_is_refused(values: dict[str, str], expected: str) -> None:
    with pytest.raises(MllmAssetsError, match=expected):
        Correction(**{"sample_id": SAMPLE, "action": "relabel", "new": "x", "who": "Ada", **values})  # pyright: ignore


@pytest.mark.attack("JSON")
@pytest.mark.parametrize(
    "text",
    [
        "{}", "[]", "null", "7", "not json", "\udcff", "[" * 100_000, '{"sample_id": "x"}',
        json.dumps({**asdict(decision(SAMPLE)), "more": "1"}),
        json.dumps({**asdict(decision(SAMPLE)), "new": ["a"]}),
        json.dumps({**asdict(decision(SAMPLE)), "when": "yesterday"}),
        json.dumps({**asdict(decision(SAMPLE)), "new": "<image>"}),
        json.dumps({**asdict(decision(SAMPLE)), "sample_id": "*"}),
    ],
)  # fmt: skip
def test_a_line_that_is_no_decision_is_named_and_none_of_the_file_is_used(layout: Layout, text: str) -> None:
    decide(layout, decision(SAMPLE))
    path = layout.corrections("made")
    path.write_bytes(path.read_bytes() + text.encode(errors="surrogateescape") + b"\n")
    for action in (lambda: read_corrections(layout, "made"), lambda: decide(layout, decision(SAMPLE, "drop"))):
        with pytest.raises(IntegrityError, match=r"made.jsonl:2 is not a decision"):
            action()


def test_a_given_split_takes_corrections_for_every_repeat(layout: Layout) -> None:
    """The guide's split may hold the same sample on both sides; a label that is wrong in one is wrong in the other."""
    write_source(layout.root, [(png(n), f"picture {n}") for n in (0, 1, 2, 0, 1, 2)])
    spec = made_spec(4, 2, num_test=0, strategy="guide")
    found = rows(line(spec, layout))
    twice = next(key for key in found if f"{key}-2" in found)
    decide(layout, decision(twice, old=answer(found[twice][1])))
    after = rows(line(spec, layout))
    assert answer(after[twice][1]) == answer(after[f"{twice}-2"][1]) == "right"
