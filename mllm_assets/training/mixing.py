"""Which rows a recipe trains on and evaluates, in which order: several entries mixed, a part held out.

The draws are those of Hugging Face `datasets`, as in LLaMA-Factory (0.9.5, `data/data_utils.py`), on row numbers only.
"""

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from mllm_assets.errors import DataError
from mllm_assets.training.spec import TrainSpec

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")

STOPPING = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}


def mixed(entries: Sequence[Sequence[T]], spec: TrainSpec) -> list[T]:
    """Return the rows of all entries in the order of `mix_strategy`; a row may come twice with `interleave_over`."""
    rows = list(chain.from_iterable(entries))
    if len(entries) == 1 or spec.mix_strategy == "concat":
        return rows
    from datasets import interleave_datasets

    first = [sum(map(len, entries[:k])) for k in range(len(entries))]
    numbered = [_numbers(range(start, start + len(entry))) for start, entry in zip(first, entries, strict=True)]
    merged = interleave_datasets(
        numbered,
        probabilities=spec.probabilities,
        seed=spec.seed,
        stopping_strategy=STOPPING[spec.mix_strategy],  # pyright: ignore[reportArgumentType]
    )
    return [rows[number] for number in merged["number"]]


def split(rows: Sequence[T], spec: TrainSpec) -> tuple[list[T], list[T]]:
    """Return the rows to train on and those that `val_size` holds out.

    Raises:
        DataError: One of the two would be empty.
    """
    if not spec.val_size:
        return list(rows), []
    # Above 1 a number of rows, below a share of them: scikit-learn's rule, which `datasets` follows
    size = int(spec.val_size) if spec.val_size > 1 else spec.val_size
    try:
        parts = _numbers(range(len(rows))).train_test_split(test_size=size, seed=spec.seed)
    except ValueError:
        raise DataError(
            f"val_size is {spec.val_size}, and the recipe has {len(rows)} rows: nothing would be left to train on or "
            f"to evaluate. Choose a share between 0 and 1, or a number of rows below {len(rows)}."
        ) from None
    return [rows[k] for k in parts["train"]["number"]], [rows[k] for k in parts["test"]["number"]]


def _numbers(values: range) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_dict({"number": list(values)})
