"""What LLaMA-Factory 0.9.5 computes, recorded by tests/golden/record_llamafactory.py, against what a run does here.

The recordings in tests/golden/parity cover the guide's recipes; these cover what those do not: other batch sizes, a
short last group, images of every mode and size, batches without an image, chosen modules, mixing, packing.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.recipe.load import load_recipe
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.encoding.inputs import read_inputs
from mllm_assets.training.loop.engine import train_task
from mllm_assets.training.models import freezing
from mllm_assets.training.models.load import load_config, model_on_meta
from mllm_assets.training.models.vocabulary import extended_base
from mllm_assets.worker.protocol import Reporter
from tests.golden import fidelity_data
from tests.worker_tasks import training

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps:UserWarning"),
]

RECORDINGS = Path(__file__).parents[1] / "golden" / "llamafactory"
CASES = sorted(path.stem for path in RECORDINGS.glob("*.json"))


def recording(case: str) -> dict[str, Any]:
    return json.loads((RECORDINGS / f"{case}.json").read_text())


# Two seconds each: the rest belongs to make test-all
QUICK = {"uneven_accumulation", "every_image_mode_tower_trains", "batches_without_images", "freeze_first_layer"}
QUICK |= {
    "neftune",
    "default_system",
    "evaluated_apart",
    "lora_some_modules",
    "packing",
    "val_size_share",
    "interleave_over",
    "mask_history",
    "new_tokens",
}
RANDOM = {"new_tokens_grow"}  # embeddings that grow begin with draws of the process
TRAINED = [case for case in CASES if "error" not in recording(case)]


@pytest.fixture(scope="session")
def fidelity_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fidelity")
    fidelity_data.write(directory)
    return directory


def spec_of(config: dict[str, Any], folder: Path) -> TrainSpec:
    """Read the recipe as a user's file is read."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "model", **config}))
    return load_recipe(path).spec


def without_padding(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """LLaMA-Factory fills a packed sequence up to `cutoff_len`."""
    length = max(index + 1 for index, token in enumerate(row["input_ids"]) if token)
    return {key: values[:length] for key, values in row.items()}


def train(spec: TrainSpec, parity_dir: Path, data_dir: Path, run_dir: Path) -> dict[str, list[float]]:
    """Train and return what was logged."""
    train_task(training(spec, model_dir=parity_dir / "model", data_dir=data_dir, run_dir=run_dir), Reporter())
    lines = [json.loads(line) for line in (run_dir / "trainer_log.jsonl").read_text().splitlines()]
    keys = dict.fromkeys(key for line in lines for key in line if key == "loss" or key.startswith("eval_"))
    return {key: [line[key] for line in lines if key in line] for key in keys}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in TRAINED]
)
def test_rows_trainable_set_and_losses_equal_llamafactorys(
    parity_dir: Path, fidelity_dir: Path, tmp_path: Path, case: str
) -> None:
    recorded = recording(case)
    spec = spec_of(recorded["config"], tmp_path)
    model_dir = extended_base(parity_dir / "model", spec, tmp_path)
    inputs = read_inputs(spec, model_dir, Dataset(fidelity_dir), tmp_path / "rows", Reporter())
    for found, expected in ((inputs.train_rows, recorded["train_rows"]), (inputs.eval_rows, recorded["eval_rows"])):
        assert [list(row.input_ids) for row in found] == [without_padding(row)["input_ids"] for row in expected]
        assert [list(row.labels) for row in found] == [without_padding(row)["labels"] for row in expected]
        if spec.packs:
            assert [list(row.positions) for row in found] == [without_padding(row)["position_ids"] for row in expected]
    trainable = freezing.apply(spec, model_on_meta(load_config(model_dir)))
    shapes = {name: list(p.shape) for name, p in trainable.model.named_parameters()}
    assert [[name, shapes[name]] for name in trainable.names] == recorded["trainable"]
    if case in RANDOM:
        return
    logged = train(spec, parity_dir, fidelity_dir, tmp_path / "run")
    measured = {key for log in recorded["logs"] for key in log if key == "loss" or key.startswith("eval_")}
    assert logged.keys() == measured
    for key in measured:
        expected = [log[key] for log in recorded["logs"] if key in log]
        assert logged[key] == pytest.approx(expected, abs=5e-6)


@pytest.mark.slow
def test_neat_packing_trains_and_evaluates(parity_dir: Path, fidelity_dir: Path, tmp_path: Path) -> None:
    """LLaMA-Factory 0.9.5 has no trajectory for it; the first loss is that of the same rows in one batch."""
    config = {**recording("packing")["config"], "packing": None, "num_train_epochs": 1, "disable_shuffling": True}
    config |= {"eval_dataset": "one_image", "eval_strategy": "epoch", "cutoff_len": 2048}
    losses = {}
    for neat in (True, False):
        folder = tmp_path / str(neat)
        folder.mkdir()
        size = 1 if neat else 9
        spec = spec_of({**config, "neat_packing": neat, "per_device_train_batch_size": size}, folder)
        losses[neat] = train(spec, parity_dir, fidelity_dir, folder / "run")["loss"]
    assert losses[True] == pytest.approx(losses[False], abs=5e-6)
