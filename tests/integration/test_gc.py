"""`mllm-assets gc` on roots that this project's own functions wrote: what is named stays, whatever the policy."""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from mllm_assets.artifacts import point_symlink, staged_directory, staging_directory, write_manifest
from mllm_assets.cli import main
from mllm_assets.data.curate.publish import ImageWriter
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.layout import Layout
from mllm_assets.operations.artefacts import find_artefacts
from mllm_assets.operations.gc import DAY_S, Policy, delete, find_garbage
from mllm_assets.releases.versions import find_release_damage, list_releases
from tests.integration.conftest import Project, line_of, wait_for

pytestmark = pytest.mark.integration
ALL = Policy(keep_runs=1, older_than_s=0.0)
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)


class Root:
    """Writes artefacts as the assets do; each is older than the one before."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        self.now_s = time.time() - 100 * DAY_S
        self.number = 0

    def add(self, folder: str, **payload: object) -> Path:
        self.number += 1
        path = self.layout.root / folder / f"{self.number:016x}"
        with staged_directory(path) as staging:
            (staging / "part.bin").write_bytes(bytes(1000))
            write_manifest(staging, payload)
        return self.age(path)

    def age(self, path: Path) -> Path:
        self.now_s += 60
        for file in [*path.rglob("*"), path]:
            os.utime(file, (self.now_s, self.now_s))
        return path

    def run(self, recipe: str, **payload: object) -> Path:
        self.number += 1
        return self.add(f"outputs/{recipe}", weights_digest=f"{self.number:064x}", **payload)

    def garbage(self, policy: Policy = ALL, **options: str) -> set[Path]:
        return {item.path for item in find_garbage(self.layout, policy, **options).garbage}


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_the_newest_runs_of_each_recipe_stay_and_older_ones_go(root: Root) -> None:
    first = [root.run("one") for _ in range(4)]
    [other] = [root.run("two")]
    point_symlink(root.layout.outputs / "one" / "latest", first[3])
    assert root.garbage() == set(first[:3])
    assert root.garbage(Policy(keep_runs=3, older_than_s=0)) == {first[0]}
    assert root.garbage(Policy(keep_runs=1, older_than_s=200 * DAY_S)) == set()
    assert other.is_dir()


def test_what_latest_a_release_a_recipe_or_dagster_names_stays(root: Root) -> None:
    linked, released, in_yaml, materialised, base, tuned, newest = [root.run("one") for _ in range(7)]
    from_base = root.run("two", starts_from={"model_dir": f"../../one/{base.name}/model"})
    point_symlink(root.layout.outputs / "one" / "latest", linked)
    release = root.layout.releases("one") / "v1"
    with staged_directory(release) as staging:
        write_manifest(staging, {"fingerprint": released.name, "version": "v1"})
    named = f"model_name_or_path: outputs/one/{in_yaml.name}/model\noutputs/one/{materialised.name}"
    assert root.garbage(also_named=named) == {tuned}
    assert newest.is_dir() and from_base.is_dir()


def test_metrics_and_predictions_stay_with_their_weights_and_go_with_them(root: Root) -> None:
    made = []
    for _ in range(3):
        run = root.run("one")
        weights = json.loads((run / "manifest.json").read_text())["weights_digest"]
        predictions = root.add("outputs/one/predictions")
        inputs = {"weights_digest": weights, "predictions_path": root.layout.relative(predictions)}
        made.append((run, predictions, root.add("outputs/one/eval_metrics", inputs=inputs)))
    root.age(made[0][0])  # the first run is the newest again; its metrics are the oldest
    kept = {*made[0], made[2][1], made[2][2]}  # of metrics and predictions the newest stay too
    assert root.garbage() == {path for paths in made for path in paths} - kept


def test_old_versions_of_a_dataset_go_with_what_they_alone_were_made_from(root: Root) -> None:
    versions = []
    for _ in range(3):
        raw = root.add("data/.raw/birds")
        quality = root.add("data/.quality/birds", raw_digest=raw.name)
        version = root.add("data/.versions/birds", raw_digest=raw.name, quality_digest=quality.name)
        versions.append((raw, quality, version))
    point_symlink(root.layout.data / "birds", versions[1][2])
    assert root.garbage() == set(versions[0])


def test_decisions_that_no_version_was_made_with_go_and_the_newest_and_those_in_use_stay(root: Root) -> None:
    """One folder for each change of a decision stayed for ever."""
    folder = "data/.corrections/emoji"
    used, unused, newest = (root.add(folder) for _ in range(3))
    version = root.age(root.add("data/.versions/emoji", corrections=used.name))
    point_symlink(root.layout.data / "emoji", version)
    point_symlink(root.layout.settled("emoji", "latest"), newest)
    assert root.garbage() == {unused}
    assert root.garbage(in_progress="a run") == set()


def test_images_that_only_a_version_that_goes_names_go_with_it_and_a_persons_picture_stays(root: Root) -> None:
    spec = DatasetSpec(name="birds", source=SourceSpec(kind="image_folder", path="x"), prompts=("?",))
    images = []
    for text in (b"old", b"new"):
        writer = ImageWriter(spec, root.layout)
        data = PNG + text  # what comes after the end of a PNG changes its digest only
        name = writer.write(data, hashlib.sha256(data).hexdigest(), "train_000000")
        path = root.layout.data / ".versions" / "birds" / f"{text.hex():0>16}"
        with staged_directory(path) as staging:
            writer.write_list(staging / "images.sha256")
            write_manifest(staging, {"kind": "split"})
        images.append(root.age(root.layout.data / name))
        root.age(path)
    mine = root.layout.images / "0123456789abcdef.png"
    mine.write_bytes(b"named like one of ours, and is none")
    (root.layout.images / "holiday.png").write_bytes(PNG)
    old_version = root.layout.data / ".versions" / "birds" / f"{b'old'.hex():0>16}"
    assert root.garbage() == {old_version, images[0]}
    plan = find_garbage(root.layout, ALL)
    time.sleep(0.05)  # a file's times move in ticks
    os.utime(images[0])  # a dataset that is being split now has found it there
    assert [item.path for item in delete(plan)] == [old_version]
    assert images[0].exists() and mine.exists()


def test_images_stay_where_an_entry_cannot_be_read(root: Root) -> None:
    root.layout.images.mkdir(parents=True)
    (root.layout.data / "mine.json").write_text("[{")
    root.layout.dataset_info.write_text(json.dumps({"mine": {"file_name": "mine.json", "formatting": "sharegpt"}}))
    plan = find_garbage(root.layout, ALL)
    assert plan.garbage == [] and plan.notes[0].startswith("images stay: ") and "mine.json" in plan.notes[0]


def test_an_entry_is_read_with_the_media_dir_of_a_recipe(root: Root) -> None:
    """Its images were not found, so no image was ever deleted; and one that it names may not be."""
    root.layout.images.mkdir(parents=True)
    names = [f"{hashlib.sha256(PNG + text).hexdigest()[:16]}.png" for text in (b"kept", b"gone")]
    for name, text in zip(names, (b"kept", b"gone"), strict=True):
        (root.layout.images / name).write_bytes(PNG + text)
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a dot"}]
    (root.layout.data / "mine.json").write_text(json.dumps([{"conversations": turns, "images": [names[0]]}]))
    entry = {"file_name": "mine.json", "formatting": "sharegpt", "columns": {"images": "images"}}
    root.layout.dataset_info.write_text(json.dumps({"mine": entry}))
    assert root.garbage() == set()
    recipe = "dataset: mine\nmedia_dir: data/images  # beside the rows\n"
    assert root.garbage(also_named=recipe) == {root.layout.images / names[1]}
    run = root.add("outputs/other")
    (run / "run.json").write_text(json.dumps({"recipe": {"media_dir": "data/images"}}))
    assert {path for path in root.garbage() if path.suffix == ".png"} == {root.layout.images / names[1]}


def test_caches_go_when_they_were_not_used_and_stay_while_a_run_is_in_progress(root: Root) -> None:
    cache = root.add("cache/features")
    root.add(f"cache/features/{cache.name}")
    fresh = root.add("cache/hidden_states")
    os.utime(fresh)
    policy = Policy(older_than_s=DAY_S)
    root.age(cache)
    assert root.garbage(policy) == {cache}
    assert root.garbage(policy, in_progress="Dagster's run 1234") == set()


def test_what_a_killed_process_left_goes_and_what_a_living_one_is_making_stays(root: Root) -> None:
    left = root.layout.data / ".raw" / "birds" / ".01234567.tmp"
    file = root.layout.data / "images" / ".a.png.89abcdef.tmp"
    download = root.layout.pretrains / ".model.download"
    for folder in (left, file.parent, download):
        folder.mkdir(parents=True)
    file.touch()
    with staging_directory(root.layout.outputs / "one") as staging:
        (staging / "half").touch()
        job = root.layout.ray_jobs / "mllm-assets-train-0123abcd"
        job.mkdir(parents=True)
        with FileLock(job.with_suffix(".lock")):
            assert root.garbage() == {left, file, download}
        job.rmdir()
        job.with_suffix(".lock").unlink(missing_ok=True)
    assert root.garbage(Policy(older_than_s=DAY_S)) == set()


def test_what_was_written_before_the_clock_was_set_back_is_as_new_as_what_came_after(root: Root) -> None:
    """The newest run had the older time, so that it went and the one before it stayed."""
    before, newest = root.run("one"), root.run("one")
    now_s = time.time()
    for path, time_s in ((before, now_s + DAY_S), (newest, now_s + 60)):
        for file in [*path.rglob("*"), path]:
            os.utime(file, (time_s, time_s))
    assert root.garbage() == set()


def test_what_was_used_by_a_clock_that_was_set_back_after_it_was_found_stays(root: Root) -> None:
    old, _ = root.add("cache/features"), root.add("cache/features")
    plan = find_garbage(root.layout, Policy(older_than_s=DAY_S))
    assert old in {item.path for item in plan.garbage}
    os.utime(old / "part.bin", (1, 1))
    os.utime(old / "manifest.json", (1, 1))
    os.utime(old, (1, 1))
    assert old not in {item.path for item in delete(plan)} and old.is_dir()


def test_it_is_dry_unless_told_to_delete(
    root: Root, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(root.layout.root))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    runs = [root.run("one") for _ in range(3)]
    assert main(["gc", "--keep-runs", "1"]) == 0
    assert "2 places can go; nothing was deleted (--delete does it)" in capsys.readouterr().out
    assert all(run.is_dir() for run in runs)
    assert main(["gc", "--keep-runs", "1", "--delete"]) == 0
    assert "deleted 0.0 MiB in 2 places" in capsys.readouterr().out
    assert [run.is_dir() for run in runs] == [False, False, True]
    assert main(["gc"]) == 0
    assert "0 places can go" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(20))
def test_whatever_was_made_in_whatever_order_all_that_is_named_is_there_after_a_collection(
    root: Root, seed: int
) -> None:
    """Follows every name from every link and release, and finds its artefact; and a second collection finds nothing."""
    rng = random.Random(seed)
    made: list[Path] = []
    for _ in range(rng.randint(5, 40)):
        folder = rng.choice(
            ["outputs/a", "outputs/b", "outputs/a/predictions", "outputs/a/eval_metrics", "data/.raw/d",
             "data/.quality/d", "data/.versions/d"]
        )  # fmt: skip
        made.append(root.add(folder, made_from=[path.name for path in rng.sample(made, min(len(made), 2))]))
    for link in ("outputs/a/latest", "data/d"):
        point_symlink(root.layout.root / link, rng.choice(made))
    released = rng.choice(made)
    with staged_directory(root.layout.releases("a") / "v1") as staging:
        write_manifest(staging, {"fingerprint": released.name})

    delete(find_garbage(root.layout, ALL))

    by_name = {artefact.path.name for artefact in find_artefacts(root.layout)}
    assert (root.layout.outputs / "a" / "latest").resolve().is_dir() and (root.layout.data / "d").resolve().is_dir()
    assert released.is_dir()
    for artefact in find_artefacts(root.layout):
        assert set(json.loads((artefact.path / "manifest.json").read_text())["made_from"]) <= by_name
    assert find_garbage(root.layout, ALL).garbage == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_collection_beside_a_training_leaves_it_alone_and_a_release_and_the_newest_run_whole(
    released: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy is the harshest there is: everything that may go goes, however young."""
    project = released
    monkeypatch.setenv("DAGSTER_HOME", str(project.home))
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(project.root))
    monkeypatch.chdir(project.root)
    project.write_recipe("mine", freeze_vision_tower=True, max_steps=3, save_steps=3, max_samples=16)
    project.made(line_of("mine"))
    [first, second] = list_releases(project.layout, "mine")
    old, new = (json.loads((r.directory / "manifest.json").read_text())["fingerprint"] for r in (first, second))
    stray = shutil.copytree(project.layout.outputs / "mine" / old, project.layout.outputs / "mine" / "0123456789abcdef")

    project.write_recipe("two", max_steps=60, save_steps=5)
    training = project.start("mllm_assets.cli", "train", "configs/two.yaml")
    log = wait_for(lambda: next(iter(project.layout.outputs.glob("two/*/trainer_log.jsonl")), None), "the run")
    wait_for(lambda: next(iter(log.parent.glob("checkpoint-*/manifest.json")), None), "a checkpoint")

    newer = project.layout.outputs / "two" / "fedcba9876543210"  # so that being the newest does not save the run
    newer.mkdir()
    os.utime(newer, (time.time() + 3600, time.time() + 3600))

    processes = psutil.Process(training.pid).children(recursive=True)
    for process in processes:
        process.suspend()  # or it would be finished before the collection is
    assert main(["gc", "--keep-runs", "1", "--older-than", "0m", "--delete"]) == 0
    assert not stray.exists()
    newer.rmdir()
    before = len(log.read_text().splitlines())
    for process in processes:
        process.resume()
    wait_for(lambda: len(log.read_text().splitlines()) > before, "the next step")
    assert training.poll() is None

    training.send_signal(signal.SIGINT)
    training.communicate(timeout=500)
    assert main(["gc", "--keep-runs", "1", "--older-than", "0m", "--delete"]) == 0
    for release in (first, second):
        assert find_release_damage(release.directory) is None
    assert main(["releases", "show", "mine"]) == 0
    assert (project.layout.outputs / "mine" / old).is_dir() and (project.layout.outputs / "mine" / new).is_dir()
    resumed = project.start("mllm_assets.cli", "train", "configs/two.yaml")
    output, _ = resumed.communicate(timeout=500)
    assert resumed.returncode == 0, output
    assert project.run_manifest("two")["resumed_from_step"] > 0
    assert "is already finished" in project.made(line_of("mine", "checkpoint"))
