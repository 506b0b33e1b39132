"""Hidden states at the lowest layer that trains, computed once per row.

Where tower, projector, embeddings and the first k layers are frozen, what enters layer k is the same at every step.
With it cached, a step runs the layers from k up and nothing else. It is exact: a row's states do not depend on what it
is batched with, because attention stays inside a row, padding stands on the right and no kernel mixes rows; only
rounding differs.

Shape suffixes: B rows, T tokens, H the language model's hidden size.
Not covered: packed rows; a prefix with dropout (refused).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mllm_assets.artifacts import digest_json, sha256_file
from mllm_assets.errors import IntegrityError
from mllm_assets.training.collate import Collator
from mllm_assets.training.device import Precision
from mllm_assets.training.encode import EncodedRow
from mllm_assets.training.features import TOLERANCE, probes, relative_difference
from mllm_assets.training.shards import ShardStore
from mllm_assets.training.spec import TrainSpec
from mllm_assets.training.tower import image_processing, library_versions, weight_digests

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter

LAYERS = "model.language_model.layers"
NUM_ROWS_PER_SHARD = 64
NUM_ROWS_PER_PASS = {"cpu": 2, "cuda": 16, "mps": 4}


class CachedLayer(nn.Module):
    """Stands in the place of a layer below the boundary: its input already is the prefix's output."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states


class _ReachedBoundary(Exception):
    """Ends a forward pass where its result is no longer needed."""

    def __init__(self, hidden_BTH: torch.Tensor) -> None:
        super().__init__()
        self.hidden_BTH = hidden_BTH


def first_trained_layer(names: Sequence[str], num_layers: int) -> int | str:
    """Return the number of the lowest text layer with a parameter that trains, or why there is no frozen prefix.

    Args:
        names: Trainable parameters.
        num_layers: Text layers of the model; returned where only what stands above them trains.
    """
    lowest = num_layers
    for name in names:
        if "vision_tower" in name or "multi_modal_projector" in name or "embed_tokens" in name:
            part = next(p for p in ("vision_tower", "multi_modal_projector", "embed_tokens") if p in name)
            return f"{part} trains, so what enters the layers changes at every step"
        layer = re.search(r"language_model\.layers\.(\d+)\.", name)
        lowest = min(lowest, int(layer[1])) if layer else lowest
    return lowest or "layer 0 trains, so there is no frozen layer below"


def num_bytes(rows: Sequence[EncodedRow], hidden_size: int, precision: Precision) -> int:
    """Return what the hidden states of all different rows take."""
    width = 4 if precision.weights == torch.float32 else 2
    return sum(len(tokens) for tokens, _ in {(row.input_ids, row.images) for row in rows}) * hidden_size * width


def prefix_fingerprint(model: Any, boundary: int, processor: Any, spec: TrainSpec, precision: Precision) -> str:
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
            "config": model.config.to_dict(),
            "images": image_processing(processor, spec),
            "precision": precision.describe(),
            "versions": library_versions(),
        }
    )[:16]


class HiddenStateReader:
    """Hidden states of rows, read through a memory map."""

    def __init__(self, directory: Path) -> None:
        self.store = ShardStore(directory)
        self._digests: dict[Path, str] = {}

    def name(self, row: EncodedRow) -> str:
        """Return the digest of a row's tokens and of its images' bytes."""
        for path in row.images:
            if path not in self._digests:
                self._digests[path] = sha256_file(path)
        return digest_json([row.input_ids, [self._digests[path] for path in row.images]])

    def batch(self, rows: Sequence[EncodedRow], length: int) -> torch.Tensor:
        """Return hidden_BTH, padded on the right with zeros to `length` tokens.

        Raises:
            IntegrityError: A row is not there. Names it.
        """
        states = []
        for row in rows:
            name = self.name(row)
            if name not in self.store:
                raise IntegrityError(
                    f"Row {row.id} has no cached hidden states in {self.store.directory}: an image changed after they "
                    f"were made. Run again."
                )
            state_TH = self.store.get(name)
            states.append(nn.functional.pad(state_TH, (0, 0, 0, length - len(state_TH))))
        return torch.stack(states)


@torch.no_grad()
def states_of(
    model: Any, boundary: int, collator: Collator, rows: Sequence[EncodedRow], precision: Precision
) -> list[torch.Tensor]:
    """Return what enters layer `boundary`, hidden_TH of each row without its padding."""
    text = model.model.language_model
    device = text.norm.weight.device
    batch = {name: tensor.to(device) for name, tensor in collator(rows).items()}
    wanted = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
    above = text.norm if boundary == len(text.layers) else text.layers[boundary]

    def stop(_: nn.Module, arguments: tuple[torch.Tensor, ...], named: Mapping[str, Any]) -> None:
        raise _ReachedBoundary(arguments[0] if arguments else named["hidden_states"])

    hook = above.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with precision.context(device.type):
            model.model(**{name: batch[name] for name in wanted if name in batch}, use_cache=False)
    except _ReachedBoundary as reached:
        return [state[: len(row.input_ids)].cpu() for state, row in zip(reached.hidden_BTH, rows, strict=True)]
    finally:
        hook.remove()
    raise AssertionError(f"the forward pass never reached layer {boundary}")


def compute_missing(
    model: Any,
    boundary: int,
    collator: Collator,
    rows: Sequence[EncodedRow],
    directory: Path,
    precision: Precision,
    reporter: "Reporter",
    *,
    part: tuple[int, int] = (0, 1),
) -> int:
    """Compute the hidden states of the rows that are not in `directory` yet, shard by shard, like rows together.

    A damaged shard is deleted and computed afresh. Killed, the next call goes on behind the last shard.

    Returns:
        How many rows were computed.
    """
    reader = HiddenStateReader(directory)
    by_name = {reader.name(row): row for row in rows}
    for damage in reader.store.drop_damaged(by_name) if part[1] == 1 else ():
        reporter.warn(f"Cached hidden states were damaged and are computed again: {damage}.")
    by_length = sorted(by_name, key=lambda name: (len(by_name[name].input_ids), name))
    names = reader.store.missing(by_length[part[0] :: part[1]])
    per_pass = NUM_ROWS_PER_PASS[model.device.type]
    for start in range(0, len(names), NUM_ROWS_PER_SHARD):
        shard = names[start : start + NUM_ROWS_PER_SHARD]
        states: list[torch.Tensor] = []
        for first in range(0, len(shard), per_pass):
            some = [by_name[name] for name in shard[first : first + per_pass]]
            states += states_of(model, boundary, collator, some, precision)
            reporter.progress("hidden_states", start + len(states), len(names))
        reader.store.add(dict(zip(shard, states, strict=True)))
    reader.store.wait_for(by_name.keys())
    return len(names)


def require_match(
    reader: HiddenStateReader, model: Any, boundary: int, collator: Collator, rows: Sequence[EncodedRow],
    precision: Precision,
) -> None:  # fmt: skip
    """Compare the shards that will be read with their digests, and some states with the model's own.

    Raises:
        IntegrityError: A row is not there, a file is damaged, or a value differs.
    """
    reader.store.require_undamaged([reader.name(row) for row in rows])
    for row in probes(rows):
        [fresh] = states_of(model, boundary, collator, [row], precision)
        [cached] = reader.batch([row], len(row.input_ids))
        difference = relative_difference(cached, fresh)
        if difference > TOLERANCE[fresh.dtype]:
            raise IntegrityError(
                f"The cached hidden states of row {row.id} differ from the model's by {difference:.1e} of the largest "
                f"value, expected at most {TOLERANCE[fresh.dtype]:.0e}. Delete {reader.store.directory} and run again."
            )


def install(model: Any, boundary: int) -> None:
    """Let the layers below the boundary hand on their input, which is their cached output."""
    layers = model.model.language_model.layers
    for index in range(boundary):
        layers[index] = CachedLayer()
    model.main_input_name = "inputs_embeds"  # what the trainer counts tokens by
