"""What a run caches, and the reason where it does not; shards by content."""

import math
import os
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_assets.errors import IntegrityError, MachineError, RecipeError
from mllm_assets.file_digests import FileDigests
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.caches.features import FeatureStore
from mllm_assets.training.caches.prepare import CachePlan, Setup, plan_caches
from mllm_assets.training.caches.shards import TENSORS_FILE, ShardStore
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.inputs import Inputs
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.models import freezing
from mllm_assets.training.models.device import Device, Precision
from mllm_assets.training.models.load import load_config, model_on_meta
from mllm_assets.worker.tasks import CacheSettings

FP32 = Precision(weights=torch.float32, autocast=None)


def make_plan(
    parity_dir: Path,
    settings: CacheSettings,
    *,
    config: dict[str, Any] | None = None,
    num_images: int = 1,
    **values: Any,
) -> CachePlan:
    spec = TrainSpec(model_name_or_path="m", dataset="d", template="gemma3", do_train=True, **values)
    shape_config = load_config(parity_dir / "model")
    for part, overrides in (config or {}).items():
        for key, value in overrides.items():
            setattr(getattr(shape_config, part), key, value)
    shape = freezing.apply(spec, model_on_meta(shape_config))
    images = (Path("a.png"),) * num_images
    rows = [
        EncodedRow(id=str(i), input_ids=array("i", [1, 2, i]), labels=array("i", [-100, 2, i]), images=images)
        for i in range(48)
    ]
    inputs = Inputs(
        processor=None, train_rows=EncodedRows.of(rows), eval_rows=EncodedRows.of([]), digests=FileDigests()
    )
    device = Device(kind="cpu", name="a CPU", driver="", memory_gib=8)
    return plan_caches(
        Setup(
            spec=spec, model_dir=parity_dir / "model", inputs=inputs, device=device, precision=FP32, shape=shape,
            caches=settings,
        )
    )  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> CacheSettings:
    return CacheSettings(features_root=tmp_path / "features", hidden_states_root=tmp_path / "hidden_states")


FREEZE = {"finetuning_type": "freeze"}
TOP_LAYER = {**FREEZE, "freeze_trainable_layers": 1}
PROJECTOR = {"finetuning_type": "full", "freeze_language_model": True, "freeze_multi_modal_projector": False}


@pytest.mark.parametrize(("values", "tower", "boundary"), [
    (FREEZE, True, 2),
    (TOP_LAYER, True, 3),
    ({**FREEZE, "freeze_trainable_layers": -1}, True, None),
    (PROJECTOR, True, None),
    ({"finetuning_type": "full", "freeze_vision_tower": False}, False, None),
    ({"finetuning_type": "lora"}, True, None),
    ({"finetuning_type": "lora", "lora_target": "layers.3.self_attn.q_proj"}, True, 3),
])  # fmt: skip
def test_what_does_not_train_and_does_not_change_is_cached(
    parity_dir: Path, settings: CacheSettings, values: dict[str, Any], tower: bool, boundary: int | None
) -> None:
    plan = make_plan(parity_dir, settings, **values)
    assert (plan.tower, plan.boundary) == (tower, boundary)


@pytest.mark.parametrize(("values", "cache", "reason"), [
    ({"finetuning_type": "full", "freeze_vision_tower": False}, "vision_features", "the vision tower trains"),
    ({**FREEZE, "config": {"vision_config": {"attention_dropout": 0.1}}}, "vision_features", "tower has dropout"),
    ({**FREEZE, "num_images": 0}, "vision_features", "no row has an image"),
    ({**FREEZE, "max_steps": 3}, "vision_features", "the run visits a row 0.5 times, so nothing is used twice"),
    ({**FREEZE, "freeze_multi_modal_projector": False}, "hidden_states", "multi_modal_projector trains, so what"),
    ({**FREEZE, "freeze_trainable_layers": 4}, "hidden_states", "layer 0 trains, so there is no frozen layer below"),
    ({"finetuning_type": "full"}, "hidden_states", "embed_tokens trains"),
    ({**TOP_LAYER, "num_train_epochs": 1.0}, "hidden_states", "the run visits a row 1 times"),
    ({**TOP_LAYER, "config": {"text_config": {"attention_dropout": 0.1}}}, "hidden_states", "layers have dropout"),
])  # fmt: skip
def test_the_plan_says_why_something_is_not_cached(
    parity_dir: Path, settings: CacheSettings, values: dict[str, Any], cache: str, reason: str
) -> None:
    assert reason in make_plan(parity_dir, settings, **values).facts[cache]


def test_hidden_states_above_the_limit_are_not_kept(parity_dir: Path, tmp_path: Path) -> None:
    small = CacheSettings(hidden_states_root=tmp_path, max_hidden_states_gib=1e-6)
    plan = make_plan(parity_dir, small, **TOP_LAYER)
    assert plan.boundary is None
    assert "above the limit of 1e-06 GiB (max_hidden_states_gib)" in plan.facts["hidden_states"]


def test_turned_off_caches_say_so(parity_dir: Path) -> None:
    plan = make_plan(parity_dir, CacheSettings(), **TOP_LAYER)
    assert set(plan.facts.values()) == {"turned off (feature_cache: false)"}


def test_a_store_reads_what_was_added_and_knows_what_is_missing(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    store.add({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1, 3)})
    store.add({"c": torch.zeros(4, dtype=torch.bfloat16)})
    again = ShardStore(tmp_path)
    assert again.missing(["c", "d", "a", "e"]) == ["d", "e"]
    assert again.get("a").equal(torch.arange(6.0).reshape(2, 3)) and again.get("c").dtype == torch.bfloat16


def test_of_two_shards_with_one_name_the_first_is_read(tmp_path: Path) -> None:
    """Two processes may compute one image at once; a resumed run must read what it read before the kill."""
    first, second = ShardStore(tmp_path), ShardStore(tmp_path)
    first.add({"a": torch.zeros(1), "b": torch.zeros(1)})
    second.add({"a": torch.ones(1)})
    assert ShardStore(tmp_path).get("a").item() == 0


def test_of_two_shards_with_one_name_the_first_is_read_also_where_the_clock_was_set_back(tmp_path: Path) -> None:
    """By the times of the files the second was read after a restart, and the resumed run had other bits."""
    first, second = ShardStore(tmp_path), ShardStore(tmp_path)
    first.add({"a": torch.zeros(1), "b": torch.zeros(1)})
    before = set(tmp_path.iterdir())
    second.add({"a": torch.ones(1)})
    [later] = set(tmp_path.iterdir()) - before
    os.utime(later / "manifest.json", (1e9, 1e9))
    assert ShardStore(tmp_path).get("a").item() == 0


def test_a_half_written_shard_does_not_count(tmp_path: Path) -> None:
    ShardStore(tmp_path).add({"a": torch.zeros(1)})
    [shard] = tmp_path.iterdir()
    (shard / "manifest.json").unlink()
    assert ShardStore(tmp_path).missing(["a"]) == ["a"]


def test_damage_is_named_and_can_be_dropped(tmp_path: Path) -> None:
    ShardStore(tmp_path).add({"a": torch.zeros(1)})
    ShardStore(tmp_path).add({"b": torch.zeros(1)})
    [shard] = [
        path for path in tmp_path.iterdir() if "a" in (path / "manifest.json").read_text().split('"names"')[1][:20]
    ]
    data = bytearray((shard / TENSORS_FILE).read_bytes())
    data[-1] ^= 1
    (shard / TENSORS_FILE).write_bytes(data)
    store = ShardStore(tmp_path)
    store.require_undamaged(["b"])
    with pytest.raises(
        IntegrityError, match=r"is damaged: tensors\.safetensors does not match its digest\. Run mllm-assets doctor"
    ):
        store.require_undamaged(["a"])
    assert len(store.drop_damaged(["a", "b"])) == 1 and store.missing(["a", "b"]) == ["a"]


def test_waiting_for_other_processes_ends_with_a_cure(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    store.add({"a": torch.zeros(1)})
    store.wait_for(["a"])
    with pytest.raises(MachineError, match=r"1 of 2 tensors .* Put cache/ on a file system that all of them see"):
        store.wait_for(["a", "b"], timeout_s=0.3)


def test_values_that_are_not_finite_are_refused_where_they_are_compared(tmp_path: Path) -> None:
    """NaN differs from nothing: what float16 could not hold was cached for an hour, and step 1 stopped the run."""
    store, half = FeatureStore(tmp_path, FileDigests()), Precision(weights=torch.float16, autocast=None)
    good_KW, bad_KW = torch.ones(2, 3, dtype=torch.float16), torch.full((2, 3), math.inf, dtype=torch.float16)
    store.require_same("a", good_KW, good_KW, "the tower's output", half)
    with pytest.raises(RecipeError, match=r"vision features of row a are not finite in float16\. Set bf16: true"):
        store.require_same("a", bad_KW, bad_KW, "the tower's output", half)
    with pytest.raises(IntegrityError, match="row a differ from the tower's output by nan"):
        store.require_same("a", bad_KW * 0, good_KW, "the tower's output", half)
