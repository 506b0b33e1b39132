"""A dataset, a run and a release that one root made, in another root that is empty."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mllm_assets.artifacts import write_manifest
from mllm_assets.cli import main
from mllm_assets.data.curate.publish import ImageClaims
from mllm_assets.data.curate.register import register
from mllm_assets.data.curate.splits import SplitResult, split
from mllm_assets.data.ingest.spec import DatasetSpec, OutputSpec
from mllm_assets.data.quality.assess import assess
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import DataError
from mllm_assets.layout import Layout
from mllm_assets.releases.versions import current_release, seal
from mllm_assets.store.mirror import Mirror
from mllm_assets.store.objects import Store
from tests.unit.data.made_datasets import made_spec, png, run_line, write_source

pytestmark = pytest.mark.not_fast


def machine(tmp_path: Path, name: str) -> Mirror:
    layout = Layout(tmp_path / name)
    return Mirror(Store(f"file://{tmp_path}/store", layout.root), layout)


@pytest.fixture
def here(tmp_path: Path) -> Mirror:
    return machine(tmp_path, "here")


@pytest.fixture
def there(tmp_path: Path) -> Mirror:
    return machine(tmp_path, "there")


def make_dataset(mirror: Mirror, spec: DatasetSpec, seeds: range) -> tuple[SplitResult, str]:
    """Make a dataset and mirror what its assets made; returns the version and the digest of `dataset_info`."""
    write_source(mirror.layout.root, [(png(seed), f"picture {seed}") for seed in seeds])
    _, _, version = run_line(spec, mirror.layout)
    info = register(spec, mirror.layout, version.directory)
    mirror.push_split(version.directory)
    mirror.push_history(spec.name)
    mirror.push_entries(spec.name, info.digest, info.entries)
    return version, info.digest


def test_a_dataset_is_the_same_rows_and_images_elsewhere(here: Mirror, there: Mirror) -> None:
    _, digest = make_dataset(here, made_spec(), range(12))
    there.layout.data.mkdir(parents=True)
    there.layout.dataset_info.write_text(json.dumps({"mine": {"file_name": "mine.json"}}))
    there.pull_data("made", digest)
    for entry in ("made_train", "made_val"):
        assert Dataset(there.layout.data).entry(entry).digest == Dataset(here.layout.data).entry(entry).digest
    assert all(image.is_file() for row in Dataset(there.layout.data).entry("made_train").rows for image in row.images)
    assert "mine" in json.loads(there.layout.dataset_info.read_text()), "a user's own entries stay"


def test_an_image_that_is_gone_is_fetched_again(here: Mirror, there: Mirror) -> None:
    version, digest = make_dataset(here, made_spec(), range(12))
    there.pull_data("made", digest)
    next(there.layout.images.iterdir()).unlink()
    there.pull(there.layout.version("made", version.digest))
    assert len(list(there.layout.images.iterdir())) == len(list(here.layout.images.iterdir()))


def test_a_newer_version_is_followed_and_an_older_one_again(here: Mirror, there: Mirror) -> None:
    first, first_digest = make_dataset(here, made_spec(), range(12))
    second, second_digest = make_dataset(here, made_spec(answer="It is {caption}."), range(12))
    link = there.layout.data / "made"
    for version, digest in ((first, first_digest), (second, second_digest), (first, first_digest)):
        there.pull_data("made", digest)
        assert link.resolve().name == version.digest


def test_the_link_of_the_machine_that_splits_is_left_to_its_splits(here: Mirror) -> None:
    """Between `train` and `dataset_info` the newest event still names the version before."""
    _, first_digest = make_dataset(here, made_spec(), range(12))
    newer, _ = make_dataset(here, made_spec(answer="It is {caption}."), range(12))
    here.pull_data("made", first_digest)
    assert (here.layout.data / "made").resolve().name == newer.digest


def test_images_named_by_a_prefix_are_the_versions_own_and_may_be_written_again(here: Mirror, there: Mirror) -> None:
    """`pets_train_000000.png` holds another picture in another version."""
    spec = made_spec(output=OutputSpec(image_prefix="pets"))
    version, digest = make_dataset(here, spec, range(12))
    there.layout.images.mkdir(parents=True)
    taken = there.layout.images / "pets_train_000000.png"
    taken.write_bytes(b"of an earlier version")
    ImageClaims(there.layout, "made").add(["images/pets_train_000001.png"])
    with pytest.raises(DataError, match="pets_train_000000.png exists and is not this dataset's, so it is not replac"):
        there.pull_data("made", digest)
    taken.rename(aside := taken.with_name("pets_train_000001.png"))
    there.pull_data("made", digest)
    assert taken.read_bytes() == (here.layout.images / taken.name).read_bytes()
    assert aside.read_bytes() == (here.layout.images / aside.name).read_bytes()
    write_source(there.layout.root, [(png(seed), f"picture {seed}") for seed in range(50, 62)])
    run_line(spec, there.layout)
    assert taken.read_bytes() != (here.layout.images / taken.name).read_bytes()
    assert version.directory.is_dir()


def test_samples_keep_their_sides_though_another_machine_splits(here: Mirror, there: Mirror) -> None:
    """Which side a sample was on is in the database alone: without it a grown source is split afresh."""
    spec = made_spec(num_train=8, num_val=4)
    version, _ = make_dataset(here, spec, range(12))
    write_source(there.layout.root, [(png(seed), f"picture {seed}") for seed in range(30)])
    there.pull_history("made")
    raw, quality, grown = run_line(spec, there.layout, "run-2")
    assert quality.num_decoded == 30 - 12, "what was measured elsewhere is not decoded again"
    before, after = _ids(version), _ids(grown)
    assert not before["val"] & after["train"] and not before["train"] & after["val"]
    assert before["val"] <= after["val"]
    assert assess(spec, there.layout, raw.directory, "run-3").digest == quality.digest
    assert split(spec, there.layout, raw.directory, quality.directory, "run-3").digest == grown.digest


def _ids(version: SplitResult) -> dict[str, set[str]]:
    return {
        side: {row["id"] for row in json.loads((version.directory / f"{side}.json").read_text())}
        for side in ("train", "val")
    }


def test_a_history_is_written_once_for_equal_rows_and_replaces_the_one_before(here: Mirror) -> None:
    make_dataset(here, made_spec(), range(12))
    folder = here.layout.history("made")
    [first] = folder.iterdir()
    here.push_history("made")
    assert list(folder.iterdir()) == [first]
    make_dataset(here, made_spec(), range(14))
    [second] = folder.iterdir()
    assert second != first


def test_finished_runs_of_a_fingerprint_come_with_the_forced_ones_and_the_latest_link(
    here: Mirror, there: Mirror
) -> None:
    folder = here.layout.outputs / "mine"
    for name in ("0123", "0123-2", "0456"):
        (folder / name / "model").mkdir(parents=True)
        (folder / name / "model" / "weights").write_text(name)
        write_manifest(folder / name, {})
        here.push_run(folder / name)
    here.push_run(folder / "0123-2")
    assert not there.pull_runs(there.layout.outputs / "mine" / "9999")
    assert there.pull_runs(there.layout.outputs / "mine" / "0123")
    assert sorted(path.name for path in (there.layout.outputs / "mine").iterdir()) == ["0123", "0123-2", "latest"]
    assert (there.layout.outputs / "mine" / "latest").resolve().name == "0123-2"


def test_features_come_shard_by_shard_and_only_those_that_are_missing(here: Mirror, there: Mirror) -> None:
    tower = here.layout.features / "tower"
    for shard in ("aa", "bb"):
        (tower / shard).mkdir(parents=True)
        (tower / shard / "tensors.safetensors").write_text(shard)
        write_manifest(tower / shard, {})
    here.push_features("mine", tower)
    said: list[str] = []
    replace(there, notify=said.append).pull_features("mine")
    assert [line.split(" ")[0] for line in said] == ["cache/features/tower/aa", "cache/features/tower/bb"]
    replace(there, notify=said.append).pull_features("mine")
    there.pull_features("another")
    assert len(said) == 2


def test_a_release_comes_with_which_one_is_current_and_a_rollback_is_followed(
    here: Mirror, there: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("v1", "v2"):
        directory = here.layout.releases("pets") / version
        directory.mkdir(parents=True)
        (directory / "weights").write_text(version)
        seal(directory, {"recipe": "pets", "version": version, "digest": version})
        here.push(directory)
    here.push_current("pets")
    there.follow_current("pets")
    assert [path.name for path in sorted(there.layout.releases("pets").iterdir())] == ["current", "v2"]

    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(here.layout.root))
    monkeypatch.setenv("MLLM_ASSETS_STORE", here.store.url)
    assert main(["releases", "rollback", "pets"]) == 0
    for machine in (here, there):
        machine.follow_current("pets", all_versions=True)
        current = current_release(machine.layout, "pets")
        assert current is not None and current.version == "v1"
    assert (there.layout.releases("pets") / "v2").is_dir()
