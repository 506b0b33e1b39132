"""A file between two assets of a dataset is deleted, cut or has a flipped bit: making it again is all that it takes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mllm_assets.artifacts import is_sound
from mllm_assets.data.ingest.raw_files import SAMPLES_FILE
from mllm_assets.data.quality.groups import IMAGES_FILE, QUALITY_FILE
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.sharegpt.dataset import IMAGE_LIST, Dataset
from mllm_assets.errors import MllmAssetsError
from mllm_assets.layout import Layout
from mllm_assets.operations.repair import check_artefacts, find_damages, repair
from tests.damage import DAMAGES, OTHER_KINDS
from tests.unit.data.made_datasets import made_spec, png, run_line, write_source

pytestmark = [pytest.mark.attack("damage"), pytest.mark.slow]
SPEC = made_spec()
FILES = {
    "raw": f"data/.raw/made/*/{SAMPLES_FILE}",
    "raw manifest": "data/.raw/made/*/manifest.json",
    "quality": f"data/.quality/made/*/{QUALITY_FILE}",
    "image quality": f"data/.quality/made/*/{IMAGES_FILE}",
    "quality manifest": "data/.quality/made/*/manifest.json",
    "database": "data/quality.duckdb",
    "snapshot": "data/.quality.duckdb.snapshot",
    "train.json": "data/.versions/made/*/train.json",
    "val.json": "data/.versions/made/*/val.json",
    "image list": f"data/.versions/made/*/{IMAGE_LIST}",
    "split manifest": "data/.versions/made/*/manifest.json",
    "image": "data/images/*.png",
    "dataset_info.json": "data/dataset_info.json",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = Layout(tmp_path_factory.mktemp("made"))
    write_source(layout.root, [(png(seed), f"A caption, number {seed}.") for seed in range(12)])
    run_line(SPEC, layout)
    return layout


@pytest.fixture
def copy(made: Layout, tmp_path: Path) -> Layout:
    shutil.copytree(made.root, tmp_path / "copy", symlinks=True)
    return Layout(tmp_path / "copy")


def digests(layout: Layout) -> list[str]:
    dataset = Dataset(layout.data)
    for entry in (SPEC.train_entry, SPEC.val_entry):
        dataset.entry(entry).require_unchanged()
    return [dataset.entry(entry).digest for entry in (SPEC.train_entry, SPEC.val_entry)]


def facts(layout: Layout) -> list[dict]:
    store = QualityStore(layout.quality_db)
    return store.query("SELECT sample_id, split FROM split_membership ORDER BY ALL")


def damaged(layout: Layout, name: str, damage: str) -> Path:
    path = sorted(layout.root.glob(FILES[name]))[0]
    {**DAMAGES, **OTHER_KINDS}[damage](path)
    return path


def or_error(use: Callable[[], object]) -> object:
    """What a use gives, or the error of ours that it raises."""
    try:
        return use()
    except MllmAssetsError as error:
        assert "\n" not in str(error)
        return error


@pytest.mark.parametrize("damage", [*DAMAGES, *OTHER_KINDS])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_or_harmless_and_the_line_makes_it_again(
    name: str, damage: str, made: Layout, copy: Layout
) -> None:
    """Six of sixteen such files needed a person who knew which hidden folder to delete."""
    before, rows = digests(made), facts(made)
    damaged(copy, name, damage)
    for use, right in ((digests, before), (facts, rows)):
        found = or_error(lambda use=use: use(copy))
        assert found == right or isinstance(found, MllmAssetsError)
    made_again = or_error(lambda: run_line(SPEC, copy))
    if isinstance(made_again, MllmAssetsError):
        assert "mllm-assets doctor --repair" in str(made_again)
        repair(copy)
        run_line(SPEC, copy)
    assert (digests(copy), facts(copy)) == (before, rows)
    assert [found for found in find_damages(copy) if found.kind != "entries"] == []


@pytest.mark.parametrize("damage", [*DAMAGES, *OTHER_KINDS])
@pytest.mark.parametrize("name", [name for name in FILES if name != "snapshot"])
def test_doctor_names_each_damaged_file_and_its_advice_works(
    name: str, damage: str, made: Layout, copy: Layout
) -> None:
    before, rows = digests(made), facts(made)
    path = damaged(copy, name, damage)
    harmless = name == "dataset_info.json" and damage == "gone"
    findings = repair(copy)
    said = " ".join(finding.detail for finding in findings)
    if not harmless and not (name == "dataset_info.json" and damage == "flipped"):  # it may be JSON as before
        assert path.name in said or path.parent.name in said
        assert {finding.status for finding in findings} <= {"warn", "fail"}
    run_line(SPEC, copy)
    assert (digests(copy), facts(copy)) == (before, rows)
    assert [finding.status for finding in repair(copy)] == ["ok"]


def test_the_quick_look_of_doctor_sees_what_sizes_show(copy: Layout) -> None:
    assert check_artefacts(copy).status == "ok"
    path = damaged(copy, "train.json", "cut")
    finding = check_artefacts(copy)
    assert (finding.status, finding.next_step) == ("fail", "mllm-assets doctor --repair")
    assert path.parent.name in finding.detail and "train.json has" in finding.detail


def test_a_database_that_is_damaged_together_with_its_copy_is_kept_and_made_again(made: Layout, copy: Layout) -> None:
    for name in ("database", "snapshot"):
        damaged(copy, name, "cut")
    with pytest.raises(MllmAssetsError, match="doctor --repair, which moves both away, and materialise"):
        facts(copy)
    [finding] = repair(copy)
    assert finding.status == "warn" and "sample_quality" in finding.next_step
    run_line(SPEC, copy)
    assert facts(copy) == facts(made)
    assert (copy.data / "quality.duckdb.damaged-1").is_file()


def test_entries_that_people_wrote_survive_a_repair(copy: Layout) -> None:
    path = copy.dataset_info
    path.write_text(path.read_text().rstrip().removesuffix("}") + ', "mine": {"file_name": "mine.json"}')
    [finding] = repair(copy)
    assert "dataset_info.json.damaged-1" in finding.detail and "Copy entries" in finding.next_step
    assert '"mine"' in (copy.data / "dataset_info.json.damaged-1").read_text()
    assert digests(copy)  # the dataset's own are back


def test_a_whole_root_is_left_alone(copy: Layout) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.root.rglob("*")}
    assert [finding.status for finding in repair(copy)] == ["ok"]
    after = {path: path.stat().st_mtime_ns for path in copy.root.rglob("*") if not path.name.endswith(".lock")}
    assert {path: mtime for path, mtime in before.items() if path in after and path.is_file()} == {
        path: mtime for path, mtime in after.items() if path.is_file()
    }
    assert all(is_sound(path) for path in copy.data.glob(".versions/*/[!.]*") if path.is_dir())
