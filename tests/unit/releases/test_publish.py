"""Releases and their cards."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from huggingface_hub import ModelCard

from mllm_assets import disk, file_digests
from mllm_assets.artifacts import find_damage, read_manifest, sha256_file, write_manifest
from mllm_assets.errors import GateError, IntegrityError
from mllm_assets.evaluation.gates import GateSpec
from mllm_assets.evaluation.metrics import compute_metrics, read_metrics
from mllm_assets.evaluation.table import to_table
from mllm_assets.file_digests import FileDigests, remember
from mllm_assets.layout import Layout
from mllm_assets.releases.model_card import Lineage, without_front_matter
from mllm_assets.releases.publish import Candidate, Judgement, publish
from mllm_assets.releases.report import show_facts, show_text
from mllm_assets.releases.versions import Release, current_release, list_releases
from tests.unit.evaluation.made_predictions import prediction, predictions

pytestmark = pytest.mark.not_fast

LINEAGE: Lineage = {
    "base_model": {"name": "gemma3_tiny", "fingerprint": "f" * 64, "license": "apache-2.0"},
    "pretrained_model": {"name": "gemma3_tiny", "fingerprint": "f" * 64, "license": "apache-2.0"},
    "datasets": [
        {
            "entry": "pets_train",
            "use": "train",
            "digest": "a" * 64,
            "num_rows": 40,
            "hub_id": "me/pets",
            "revision": "1ab",
        },
        {"entry": "pets_val", "use": "evaluate", "digest": "b" * 64, "source": "parquet: pets | cats", "license": None},
    ],
    "recipe": {"finetuning_type": "full", "learning_rate": 0.001},
    "versions": {"mllm-assets": "0.1.0", "transformers": "5.23.0"},
    "command": "mllm-assets run pets",
    "leaks": [],
}
RUN = {
    "fingerprint": "0123456789abcdef",
    "weights_digest": "c" * 64,
    "num_steps": 4,
    "recipe": {"template": "gemma3", "image_max_pixels": 589824, "enable_thinking": True},
    "reload": {"num_missing": 0, "num_unexpected": 0, "loss_saved": 1.5, "loss_reloaded": 1.5},
}


def make_run(directory: Path, weights: bytes = b"w" * (2 << 20)) -> Path:
    """A finished training run whose model is a file of bytes."""
    (directory / "model").mkdir(parents=True)
    (directory / "model" / "config.json").write_text("{}")
    (directory / "model" / "model.safetensors").write_bytes(weights)
    (directory / "model" / "README.md").write_text("left by a library")
    (directory / "adapter").mkdir()
    (directory / "adapter" / "adapter_model.safetensors").write_bytes(b"a")
    config = {"base_model_name_or_path": "/a/folder/of/this/machine", "r": 8}
    (directory / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (directory / "checkpoint-4").mkdir()
    (directory / "checkpoint-4" / "optimizer.pt").write_bytes(b"o")
    write_manifest(directory, RUN)
    return directory


@cache
def usual_metrics() -> str:
    """The metrics of the predictions that most tests release, as JSON: their bootstrap takes a second."""
    return json.dumps(compute_metrics(predictions(), ["cat", "dog", "cat"]))


def release(run_dir: Path, root: Path, said: pa.Table | None = None, **kwargs: Any) -> Release:
    judgement = Judgement(
        metrics=compute_metrics(said, ["cat", "dog", "cat"]) if said else json.loads(usual_metrics()),
        predictions=said or predictions(),
        weights_digest=kwargs.pop("scored_weights", "c" * 64),
        predictions_digest="p" * 64,
        data_digests={},
    )
    candidate = Candidate(
        recipe_name="pets", run_dir=run_dir, judgement=judgement, lineage=kwargs.pop("lineage", LINEAGE)
    )
    return publish(candidate, kwargs.pop("gates", GateSpec()), Layout(root), **kwargs)


def test_a_release_is_a_model_directory_with_card_metrics_and_manifest(tmp_path: Path) -> None:
    made = release(make_run(tmp_path / "run"), tmp_path)
    assert made.directory == tmp_path / "releases" / "pets" / "v1"
    assert sorted(p.relative_to(made.directory).as_posix() for p in made.directory.rglob("*")) == [
        "README.md", "adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "config.json",
        "eval_metrics.json", "llamafactory_adapter.yaml", "llamafactory_inference.yaml", "manifest.json",
        "model.safetensors", "predictions.parquet",
    ]  # fmt: skip
    assert find_damage(made.directory) is None
    manifest = read_manifest(made.directory)
    assert manifest["lineage"]["base_model"]["name"] == "gemma3_tiny"
    assert [gate["name"] for gate in manifest["gates"] if gate["passed"]] == [
        "checkpoint_reloads_strictly", "no_leakage", "beats_base_model", "beats_most_common_answer",
        "the_model_uses_the_image",
    ]  # fmt: skip
    assert read_metrics(made.directory)["entries"]["pets_val"]["num_samples"] == 6


def test_weights_share_their_blocks_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release of an 8 GB model must not cost another 8 GB, nor be read twice for its digest."""
    monkeypatch.setattr(disk, "_clone", lambda *_: False)  # whose blocks cannot be compared by name
    run, hashed, sha256 = make_run(tmp_path / "run"), list[str](), sha256_file
    monkeypatch.setattr(file_digests, "sha256_file", lambda path: hashed.append(path.name) or sha256(path))
    made = release(run, tmp_path)
    assert hashed.count("model.safetensors") == 1
    assert (made.directory / "model.safetensors").samefile(run / "model" / "model.safetensors")
    assert not (made.directory / "config.json").samefile(run / "model" / "config.json")


def test_a_model_that_was_read_to_ask_it_is_hashed_for_its_release_only_where_it_was_touched_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's model was hashed three times in a line: when it was written, asked and released."""
    run, hashed, sha256 = make_run(tmp_path / "run"), list[str](), sha256_file
    weights, read = run / "model" / "model.safetensors", FileDigests()
    for path in (weights, run / "model" / "config.json"):
        read.of(path)
    monkeypatch.setattr(file_digests, "sha256_file", lambda path: hashed.append(path.name) or sha256(path))
    remember(read.states(run / "model"))
    made = release(run, tmp_path)
    assert hashed.count("model.safetensors") == 0
    assert read_manifest(made.directory)["files"]["model.safetensors"]["sha256"] == sha256(weights)

    before, other = weights.stat(), tmp_path / "other.safetensors"
    other.write_bytes(b"v" * before.st_size)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(weights)
    with pytest.raises(GateError, match=r"model\.safetensors does not match its digest"):
        release(run, tmp_path / "other")


def test_a_digest_that_was_recorded_and_not_read_is_not_handed_on(tmp_path: Path) -> None:
    read, recorded = tmp_path / "read", tmp_path / "recorded"
    for path in (read, recorded):
        path.write_bytes(b"weights")
    digests = FileDigests()
    digests.of(read)
    digests.take(recorded, "0" * 64)
    assert list(digests.states(tmp_path)) == [str(read)]
    assert digests.states(tmp_path / "elsewhere") == {}


def test_the_same_checkpoint_is_released_once_and_another_gets_the_next_version(tmp_path: Path) -> None:
    first = release(make_run(tmp_path / "run"), tmp_path)
    assert release(make_run(tmp_path / "copy"), tmp_path) == first
    second = release(make_run(tmp_path / "other", b"x" * 100), tmp_path)
    assert second.version == "v2" and second.digest != first.digest
    assert list_releases(Layout(tmp_path), "pets") == [first, second]
    assert current_release(Layout(tmp_path), "pets") == second


def test_two_releases_at_once_get_a_version_each(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run-{i}", bytes([i]) * 1000) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda run: release(run, tmp_path), runs))
    assert sorted(r.version for r in made) == ["v1", "v2", "v3", "v4"]


def test_a_damaged_release_is_not_handed_out_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (release(run, tmp_path).directory / "config.json").unlink()
    assert release(run, tmp_path).version == "v2"


def test_a_model_that_fails_its_gates_is_not_released(tmp_path: Path) -> None:
    """A blocking check does not stop a later run that selects only the release."""
    with pytest.raises(GateError) as caught:
        release(make_run(tmp_path / "run"), tmp_path, predictions(answer="cat"))
    message = str(caught.value)
    assert message.startswith(
        "pets is not released: 1 of 5 gates did not pass.\n  beats_most_common_answer: pets_val: "
    )
    assert message.endswith("change the gates in the component's YAML.")
    assert list_releases(Layout(tmp_path), "pets") == []


def test_a_model_worse_than_the_release_is_not_released(tmp_path: Path) -> None:
    release(make_run(tmp_path / "run"), tmp_path)
    rows = [prediction(m, i) for m in ("base", "tuned") for i in range(6)]
    worse = [row | {"loss_nats": row["loss_nats"] + 0.5 * (row["model"] == "tuned")} for row in rows]
    said = "no_regression_against_release: pets_val: the rise in loss over the release is 0.5000"
    with pytest.raises(GateError, match=said):
        release(make_run(tmp_path / "worse", b"y"), tmp_path, to_table(worse))


def test_a_changed_file_of_the_checkpoint_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "model" / "model.safetensors").write_bytes(b"v" * (2 << 20))
    with pytest.raises(GateError, match="checkpoint_reloads_strictly: model/model.safetensors does not match its dig"):
        release(run, tmp_path)
    assert not (tmp_path / "releases" / "pets").exists()


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="has no manifest.json, so it was never finished"):
        release(tmp_path, tmp_path)


def test_what_does_not_verify_is_not_published(tmp_path: Path) -> None:
    def refuse(directory: Path) -> dict[str, Any]:
        assert (directory / "config.json").is_file()
        raise IntegrityError("2 tensors are missing")

    with pytest.raises(IntegrityError, match="2 tensors are missing"):
        release(make_run(tmp_path / "run"), tmp_path, verify=refuse)
    assert list_releases(Layout(tmp_path), "pets") == []


def test_the_card_carries_lineage_results_and_the_command(tmp_path: Path) -> None:
    verified = {"num_missing": 0, "num_unexpected": 0, "loss": 1.25, "oldest_transformers": "4.57"}
    card = (
        release(make_run(tmp_path / "run"), tmp_path, verify=lambda _: verified).directory / "README.md"
    ).read_text()
    for text in (
        "| label_accuracy | 0.1667 | 0.8333 | 0.3333 | +0.6667 (",
        "| base model | gemma3_tiny |  | `ffffffffffffffff` | apache-2.0 |",
        "| training data `pets_train`, 40 rows | me/pets | 1ab | `aaaaaaaaaaaaaaaa` | not stated |",
        "parquet: pets \\| cats",
        "loss on a fixed input 1.250000",
        "```\n\nIt takes transformers 4.57 or newer.\n`PATH`",
        "learning_rate: 0.001",
        LINEAGE["command"],
    ):
        assert text in card


def test_a_staged_releases_card_has_the_hub_id_and_licence_of_what_its_line_began_with(tmp_path: Path) -> None:
    """The adapter goes on what it was trained on, which is not what the Hub has."""
    staged: Lineage = {
        **LINEAGE,
        "base_model": {"name": "outputs/first/latest/model", "fingerprint": "1" * 64, "license": "gemma"},
        "pretrained_model": {
            "name": "pretrains/gemma", "fingerprint": "2" * 64, "hub_id": "google/gemma", "revision": "c0ffee",
            "license": "gemma",
        },
    }  # fmt: skip
    directory = release(make_run(tmp_path / "run"), tmp_path, lineage=staged).directory
    card = (directory / "README.md").read_text()
    front = ModelCard(card).data.to_dict()
    assert (front["base_model"], front["license"]) == ("google/gemma", "gemma")
    assert "| base model | outputs/first/latest/model |  | `1111111111111111` | gemma |\n| pretrained model | " in card
    assert "| pretrained model | google/gemma | c0ffee | `2222222222222222` | gemma |\n| training data" in card
    config = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("outputs/first/latest/model", None)
    text = show_text(show_facts(Layout(tmp_path), "pets"))
    assert "  pretrained  google/gemma at c0ffee, fingerprint 2222222222222222, licence gemma\n" in text


def test_the_hub_can_read_the_cards_front_matter(tmp_path: Path) -> None:
    card = ModelCard.load(release(make_run(tmp_path / "run"), tmp_path).directory / "README.md")
    assert card.data.to_dict()["pipeline_tag"] == "image-text-to-text"
    assert card.data.to_dict()["datasets"] == ["me/pets"]
    results = {r.metric_type: r.metric_value for r in card.data.eval_results or []}
    assert results["label_accuracy"] == pytest.approx(5 / 6, abs=1e-6)


def test_the_card_says_where_the_evaluation_leaked_into_the_training(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "outputs" / "pets" / "0123")
    leaked: Lineage = {**LINEAGE, "leaks": ["3 problems, the first: images/a.png = images/a.png."]}
    with pytest.raises(GateError, match="no_leakage: 3 problems, the first: .* set `allow_leakage: true`"):
        release(run_dir, tmp_path, lineage=leaked)
    made = release(run_dir, tmp_path, lineage=leaked, allow_leakage=True)
    card = (made.directory / "README.md").read_text()
    assert "| no_leakage | no, allowed | 3 problems, the first: images/a.png = images/a.png. |" in card
    assert "**These figures may say too much:** 3 problems, the first: images/a.png = images/a.png.\n" in card


def test_a_release_says_that_it_was_trained_on_a_quantised_base(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    kind = "4-bit nf4, double, bitsandbytes 0.50.2"
    write_manifest(run_dir, {**RUN, "recipe": {**RUN["recipe"], "quantization_bit": 4}, "quantization": kind})
    directory = release(run_dir, tmp_path).directory
    assert read_manifest(directory)["quantization"] == kind
    card = (directory / "README.md").read_text()
    assert f"- Trained with `quantization_bit: 4`: adapters on a quantised base ({kind}), merged into the" in card
    plain = release(make_run(tmp_path / "plain"), tmp_path / "another").directory
    assert "quantised" not in (plain / "README.md").read_text()


def test_the_page_of_a_release_shows_the_card_without_the_metadata_before_it() -> None:
    """Dagster drew the YAML as a list of bullets, a screen of it before the first figure."""
    assert without_front_matter("---\nlicense: other\n---\n\n# mine v1\n\n---\nend\n") == "# mine v1\n\n---\nend\n"
    assert without_front_matter("# mine v1\n") == "# mine v1\n"


def test_the_card_says_among_how_many_trials_a_sweep_chose(tmp_path: Path) -> None:
    sweep = {"recipe": "pets", "num_trials": 12, "num_pruned": 3, "entries": ["pets_val"]}
    made = release(make_run(tmp_path / "run"), tmp_path, lineage={**LINEAGE, "sweep": sweep})
    card = (made.directory / "README.md").read_text()
    assert "the best of 12 trials (3 given up early) of the sweep of `pets`, chosen by the loss on pets_val." in card
