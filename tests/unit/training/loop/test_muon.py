"""Muon's steps, and that they go on from a checkpoint as if nothing had been between."""

import copy

import pytest
import torch
from torch import nn

from mllm_assets.errors import RecipeError
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.loop.muon import Muon, is_for_muon, orthogonal
from mllm_assets.training.loop.optimizers import kept_states, optimizer_name

MUON = TrainSpec(
    model_name_or_path="m", dataset="d", template="gemma3", do_train=True, finetuning_type="full", use_muon=True,
    learning_rate=1e-2, weight_decay=0.1,
)  # fmt: skip


def parts() -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    shapes = {"layers.0.proj.weight": (8, 4), "norm.weight": (4,), "embed_tokens.weight": (6, 4)}
    return [(name, nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]


def steps(named: list[tuple[str, nn.Parameter]], optimizer: Muon, numbers: range) -> None:
    for number in numbers:
        torch.manual_seed(number)
        for _, parameter in named:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def test_a_step_of_a_matrix_is_about_orthogonal_and_embeddings_are_not_matrices() -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(16, 64, generator=torch.manual_seed(1))).float())
    assert 0.5 < float(values.min()) and float(values.max()) < 1.5
    assert [is_for_muon(name, parameter) for name, parameter in parts()] == [True, False, False]


def test_it_goes_on_from_its_states_to_the_same_bits() -> None:
    whole, cut = parts(), parts()
    first = Muon(whole, MUON)
    steps(whole, first, range(2))
    for (_, mine), (_, theirs) in zip(cut, whole, strict=True):
        mine.data.copy_(theirs.data)
    again = Muon(cut, MUON)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(whole, first, range(2, 4))
    steps(cut, again, range(2, 4))
    assert all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in zip(cut, whole, strict=True))


def test_the_memory_that_is_counted_is_what_it_keeps() -> None:
    named = parts()
    optimizer = Muon(named, MUON)
    steps(named, optimizer, range(1))
    for name, parameter in named:
        kept = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
        counted = kept_states(optimizer_name(MUON), parameter, is_embedding="embed" in name)
        assert [value.shape for value in counted] == [value.shape for value in kept]


def test_it_is_refused_beside_other_rates() -> None:
    with pytest.raises(RecipeError, match="use_muon has one learning rate, and vision_lr is set"):
        TrainSpec(
            model_name_or_path="m", dataset="d", template="gemma3", do_train=True, finetuning_type="full",
            use_muon=True, vision_lr=1e-5,
        )  # fmt: skip
