"""The head of a reward model (`stage: rm`): one number for each token, of which the last is the answer's score.

It is TRL 0.24's `ValueHead`, which LLaMA-Factory 0.9.5 puts on a model, with its dropout and draws; its file has
LLaMA-Factory's name and keys.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

VALUE_HEAD_FILE = "value_head.safetensors"
NAME = "v_head"
DROPOUT = 0.1  # of TRL's
NOT_OF_FORWARD = ("labels", "shift_labels", "logits_to_keep")


class ValueHead(nn.Module):
    """Scores hidden states, in float32."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(DROPOUT)
        self.summary = nn.Linear(hidden_size, 1)

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return self.summary(self.dropout(hidden_BTH).to(self.summary.weight.dtype)).squeeze(-1)


class _Tap(nn.Module):
    """Stands in for the output layer, and keeps what that would read; no logit is computed."""

    hidden_BTH: torch.Tensor | None = None

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        self.hidden_BTH = hidden_BTH
        return hidden_BTH[..., :1]


def attach(model: Any) -> None:
    """Put a new head on a model without LoRA around it; the output layer, which no score reads, does not train."""
    hidden_size, head = model.config.get_text_config().hidden_size, model.get_output_embeddings()
    if model.device.type == "meta":
        with torch.device("meta"):
            model.v_head = ValueHead(hidden_size)
    else:
        model.v_head = ValueHead(hidden_size).to(model.device)  # drawn on the CPU, wherever it trains
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        head.weight.requires_grad_(False)


def detach(model: Any) -> dict[str, torch.Tensor]:
    """Take the head off, and return its tensors as its file has them; empty where there is none."""
    if not hasattr(model, NAME):
        return {}
    tensors = {f"{NAME}.{name}": p.detach().cpu().contiguous() for name, p in model.v_head.state_dict().items()}
    del model.v_head
    return tensors


def save(tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Write a head beside a model; nothing where there is none."""
    if tensors:
        save_file(dict(tensors), directory / VALUE_HEAD_FILE, metadata={"format": "pt"})


def put_on(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put a head on a model that was taken off or saved; nothing where there is none."""
    if tensors:
        attach(model)
        model.v_head.load_state_dict({name.removeprefix(f"{NAME}."): tensor for name, tensor in tensors.items()})


def load(model: Any, directory: Path) -> None:
    """Put the head of a published reward model on it, where the directory has one."""
    if (path := directory / VALUE_HEAD_FILE).is_file():
        put_on(model, load_file(path))
        model.v_head.eval()


def take_output_layer(model: Any) -> None:
    """Replace the output layer, until `put_back`."""
    model._output_layer = [model.lm_head]  # in a list, so that it is not a submodule
    model.lm_head = _Tap()


def put_back(model: Any) -> None:
    """Undo `take_output_layer`."""
    if isinstance(model.lm_head, _Tap):
        [model.lm_head] = model._output_layer
        del model._output_layer


def scores(model: Any, core: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return the score of each sequence of a batch, scores_B.

    `model` is what `forward` is called on; `core` is that without LoRA, with its output layer taken.
    """
    given = {name: value for name, value in inputs.items() if name not in NOT_OF_FORWARD}
    model(**given, use_cache=False)
    values_BT = core.v_head(core.lm_head.hidden_BTH)
    core.lm_head.hidden_BTH = None
    last_B1 = inputs["attention_mask"].sum(dim=-1, keepdim=True) - 1
    return values_BT.gather(-1, last_B1).squeeze(-1)
