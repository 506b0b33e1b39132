"""Read a Hugging Face dataset."""

from collections.abc import Iterator

from mllm_assets.data.rows import SourceRow
from mllm_assets.data.spec import DatasetSpec


def read_hub(spec: DatasetSpec) -> tuple[str, Iterator[SourceRow]]:
    raise NotImplementedError(spec.name)
