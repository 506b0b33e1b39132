"""Adapters that a run starts from are merged or continued as LLaMA-Factory does, and nothing is passed over."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mllm_assets.errors import ModelError, RecipeError
from mllm_assets.recipe.load import load_recipe
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.models import freezing
from mllm_assets.training.models.load import load_config, load_model, model_on_meta
from mllm_assets.training.runs.models import find_adapters, starting_fingerprint

pytestmark = pytest.mark.not_fast
RECIPE = {"model_name_or_path": "m", "dataset": "d", "template": "gemma3", "do_train": True}


def make_spec(**values: Any) -> TrainSpec:
    return TrainSpec(**{**RECIPE, "lora_target": "q_proj", "lora_rank": 2, **values})


@pytest.fixture(scope="module")
def adapters(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of which every value is set, in the form that a run publishes."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, target in enumerate(("q_proj", "up_proj")):
        model: Any = freezing.apply(make_spec(lora_target=target), load_model(parity_dir / "model")).model
        torch.manual_seed(number)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / str(number))
    return [folder / "0", folder / "1"]


def test_the_last_adapter_trains_on_and_those_before_it_are_in_the_base(parity_dir: Path, adapters: list[Path]) -> None:
    spec = make_spec(adapter_name_or_path="a,b")
    trainable = freezing.apply(spec, load_model(parity_dir / "model"), adapters)
    parameters = dict(trainable.model.named_parameters())
    saved = load_file(adapters[1] / "adapter_model.safetensors")
    found = {name.replace(".default", ""): parameters[name] for name in trainable.names}
    assert found.keys() == saved.keys() and all(found[name].equal(saved[name]) for name in saved)
    first = load_file(adapters[0] / "adapter_model.safetensors")
    stem = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    before = load_model(parity_dir / "model").get_parameter(f"{stem.removeprefix('base_model.model.')}.weight")
    added = 2 * first[f"{stem}.lora_B.weight"] @ first[f"{stem}.lora_A.weight"]  # alpha is twice the rank
    torch.testing.assert_close(parameters[f"{stem}.weight"], before + added)
    assert not trainable.adapter_stands_alone
    shape = freezing.apply(spec, model_on_meta(load_config(parity_dir / "model")), adapters)
    assert shape.names == trainable.names and shape.table == trainable.table


def test_a_new_adapter_begins_on_all_of_them(parity_dir: Path, adapters: list[Path]) -> None:
    spec = make_spec(adapter_name_or_path="a,b", create_new_adapter=True, lora_target="k_proj")
    trainable = freezing.apply(spec, load_model(parity_dir / "model"), adapters)
    assert {name.split(".")[-4] for name in trainable.names} == {"k_proj"}
    assert not trainable.adapter_stands_alone
    alone = freezing.apply(make_spec(adapter_name_or_path="a"), load_model(parity_dir / "model"), adapters[:1])
    assert alone.adapter_stands_alone


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "OFT"}, r"holds an adapter of the kind OFT: expected LORA"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            r"began with pissa_niter_4, which changed its base, so that it fits no",
        ),
        ({"target_modules": ["q_proj", "k_proj"]}, r"does not fit the model: \d+ of its tensors, such as .*k_proj"),
    ],
)
def test_an_adapter_that_means_something_else_here_is_refused(
    parity_dir: Path, adapters: list[Path], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    """PEFT only warns of tensors that it does not find, and leaves them at random."""
    shutil.copytree(adapters[0], tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=said):
        freezing.apply(make_spec(adapter_name_or_path="a"), load_model(parity_dir / "model"), [tmp_path / "a"])


def test_what_is_named_is_found_and_its_content_names_the_run(
    parity_dir: Path, adapters: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(adapters[0], tmp_path / "run" / "adapter")
    path = tmp_path / "r.yaml"

    def found(names: str, **others: object) -> tuple[Path, ...]:
        path.write_text(json.dumps({**RECIPE, "adapter_name_or_path": names, **others}))
        return find_adapters(load_recipe(path), tmp_path)

    assert found("run/adapter") == (tmp_path / "run" / "adapter",)
    with pytest.raises(ModelError, match=r"names run, which is a run; .* Write adapter_name_or_path: run/adapter"):
        found("run")
    with pytest.raises(ModelError, match=r"none has no adapter_config.json\. Name the folder of a LoRA adapter"):
        found("none")
    with pytest.raises(RecipeError, match=r"adapter_name_or_path is for LoRA, and finetuning_type is full\. Set it"):
        found("run/adapter", finetuning_type="full")
    notes = load_recipe(path, {"finetuning_type": "lora", "lora_rank": 4}).notes
    assert notes == ("lora_rank has no effect: adapter_name_or_path continues an adapter, which keeps its own.",)
    model = parity_dir / "model"
    names = {starting_fingerprint(model, some) for some in ((), adapters[:1], adapters, adapters[::-1])}
    assert len(names) == 4
