"""Hidden states at the lowest layer that trains, computed once per row.

If tower, projector, embeddings and the first k layers are frozen, the input of layer k is the same at every step.
With it cached, a step runs only the layers from k up. It is exact: a row's states do not depend on what it
is batched with, because attention stays inside a row, padding is on the right and no kernel mixes rows; only rounding
differs.

Shape suffixes: B rows, T tokens, H the language model's hidden size.
Not covered: packed rows; a prefix with dropout (refused).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mllm_assets.artifacts import digest_json
from mllm_assets.errors import IntegrityError
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.caches.shards import ImageStore, probes
from mllm_assets.training.caches.tower import image_processing, library_versions, weight_digests
from mllm_assets.training.encoding.collate import Collator
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.models.device import Precision
from mllm_assets.worker.tasks import WHOLE, Part

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

LAYERS = "model.language_model.layers"
NUM_ROWS_PER_PASS = {"cpu": 2, "cuda": 16, "mps": 4}


class CachedLayer(nn.Module):
    """Replaces a layer below the boundary: its input already is the prefix's output."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states


class _ReachedBoundary(Exception):
    """Ends a forward pass whose further results are not needed."""

    def __init__(self, hidden_BTH: torch.Tensor) -> None:
        super().__init__()
        self.hidden_BTH = hidden_BTH


def first_trained_layer(names: Sequence[str], num_layers: int) -> int | str:
    """Return the number of the lowest text layer with a parameter that trains, or why there is no frozen prefix.

    It is `num_layers`, the number of text layers, if only what is above them trains.
    """
    lowest = num_layers
    for name in names:
        for part in ("vision_tower", "multi_modal_projector", "embed_tokens"):
            if part in name:
                return f"{part} trains, so what enters the layers changes at every step"
        layer = re.search(r"language_model\.layers\.(\d+)\.", name)
        lowest = min(lowest, int(layer[1])) if layer else lowest
    return lowest or "layer 0 trains, so there is no frozen layer below"


def num_bytes(rows: EncodedRows, hidden_size: int, precision: Precision) -> int:
    """Return what the hidden states of all different rows take."""
    width = 4 if precision.weights == torch.float32 else 2
    return rows.num_different_tokens * hidden_size * width


def prefix_fingerprint(
    model: Any, boundary: int, processor: Any, spec: TrainSpec, precision: Precision, device_kind: str
) -> str:
    """Digest all that a row's states depend on but the row: weights of the prefix, processing, precision, versions."""
    core = model.model
    prefix = {
        "tower": core.vision_tower,
        "projector": core.multi_modal_projector,
        "embeddings": core.get_input_embeddings(),
        "layers": core.language_model.layers[:boundary],
    }
    return digest_json(
        {
            "weights": {name: weight_digests(module) for name, module in prefix.items()},
            "boundary": boundary,
            "config": _without_place(model.config.to_dict()),
            "images": image_processing(processor, spec),
            "precision": precision.describe(),
            "device": device_kind,
            "versions": library_versions(),
        }
    )[:16]


def _without_place(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the folder that it was read from, which says nothing of what is computed."""
    return {
        key: _without_place(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != "_name_or_path"
    }


class HiddenStateStore(ImageStore):
    """Hidden states of rows, by the digest of tokens and images."""

    kind = "hidden_states"

    def name(self, row: EncodedRow) -> str:
        """Return the digest of a row's tokens and of its images' bytes."""
        return digest_json([list(row.input_ids), [self.digest(path) for path in row.images]])

    def batch(self, rows: Sequence[EncodedRow], length: int) -> torch.Tensor:
        """Return hidden_BTH, padded on the right with zeros to `length` tokens.

        Raises:
            IntegrityError: A row's states are not in the store. Names it.
        """
        states = []
        for row in rows:
            name = self.name(row)
            if name not in self:
                raise IntegrityError(
                    f"Row {row.id} has no cached hidden states in {self.directory}: an image changed after they were "
                    f"made. Run again."
                )
            state_TH = self.get(name)
            states.append(nn.functional.pad(state_TH, (0, 0, 0, length - len(state_TH))))
        return torch.stack(states)

    def compute(self, prefix: "Prefix", rows: EncodedRows, reporter: "Reporter", *, part: Part = WHOLE) -> None:
        """Compute the missing states of rows, as `fill` does; rows of similar length go together."""
        place = {self.name(row): number for number, row in enumerate(rows)}
        lengths = rows.counted("num_tokens")
        by_length = sorted(place, key=lambda name: (lengths[place[name]], name))
        size = NUM_ROWS_PER_PASS[prefix.model.device.type]

        def make(passes: Sequence[Sequence[str]]) -> Iterator[list[torch.Tensor]]:
            return (prefix.states([rows[place[name]] for name in some]) for some in passes)

        self.fill(by_length, size, make, reporter, part=part)

    def require_match(self, prefix: "Prefix", rows: EncodedRows) -> None:
        """Compare the shards that will be read with their digests, and some states with the model's own.

        Raises:
            IntegrityError: A row's states are missing, a file is damaged, or a value differs.
        """
        self.require_undamaged(self.name(row) for row in rows)
        for row in probes(rows):
            [fresh] = prefix.states([row])
            [cached] = self.batch([row], len(row.input_ids))
            self.require_same(row.id, cached, fresh, "the model's", prefix.precision)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """A model up to the layer `boundary`, which computes hidden states."""

    model: Any
    boundary: int
    collator: Collator
    precision: Precision

    @torch.no_grad()
    def states(self, rows: Sequence[EncodedRow]) -> list[torch.Tensor]:
        """Return what enters layer `boundary`, hidden_TH of each row without its padding."""
        text = self.model.model.language_model
        device = text.norm.weight.device
        batch = {name: tensor.to(device) for name, tensor in self.collator(rows).items()}
        wanted = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
        above = text.norm if self.boundary == len(text.layers) else text.layers[self.boundary]

        def stop(_: nn.Module, arguments: tuple[torch.Tensor, ...], named: Mapping[str, Any]) -> None:
            raise _ReachedBoundary(arguments[0] if arguments else named["hidden_states"])

        hook = above.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with self.precision.context(device.type):
                self.model.model(**{name: batch[name] for name in wanted if name in batch}, use_cache=False)
        except _ReachedBoundary as reached:
            return [state[: len(row.input_ids)].cpu() for state, row in zip(reached.hidden_BTH, rows, strict=True)]
        finally:
            hook.remove()
        raise AssertionError(f"the forward pass never reached layer {self.boundary}")


def install(model: Any, boundary: int) -> None:
    """Let the layers below the boundary pass on their input, which is their cached output."""
    layers = model.model.language_model.layers
    for index in range(boundary):
        layers[index] = CachedLayer()
    model.main_input_name = "inputs_embeds"  # what the trainer counts tokens by
