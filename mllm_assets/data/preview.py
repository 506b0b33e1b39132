"""What will become of a source's samples, before anything is written: the verdicts, groups and split of a run."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mllm_assets.data.assign import NONE, TRAIN, VAL, assign
from mllm_assets.data.raw_files import ImageIndex
from mllm_assets.data.rows import SourceRow
from mllm_assets.data.sources import raw_row
from mllm_assets.data.spec import DatasetSpec
from mllm_assets.quality.decoding import measure_images
from mllm_assets.quality.groups import Looks, group_samples
from mllm_assets.quality.measure import Judge
from mllm_assets.quality.probes import DecodeLimits
from mllm_assets.quality.verdicts import sample_reject_reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """What was found among the samples that were looked at.

    Attributes:
        num_checked: So many were decoded and judged.
        num_usable: Neither rejected nor the repeat of another.
        reject_reasons: How many will be rejected, by reason.
        first_rejected: Where the first sample of each reason is.
        num_train: Of the usable ones those that can train when `num_val` of them validate.
        num_val: Those that can validate: no duplicate group is on both sides.
    """

    num_checked: int
    num_usable: int
    reject_reasons: dict[str, int]
    first_rejected: dict[str, str]
    num_train: int
    num_val: int


def preview(spec: DatasetSpec, rows: Iterable[SourceRow], val_share: float) -> Preview:
    """Judge rows as `assess` would, and split them as `split` would; texts and looks of all are held in memory.

    Args:
        spec: Answer, quality limits and seed; its sizes do not count.
        rows: Some of the source's.
        val_share: The share of the usable samples that is to validate, at least one sample.
    """
    samples = _Samples()
    limits = DecodeLimits(
        max_pixels=spec.quality.max_pixels,
        max_bytes=spec.quality.max_image_bytes,
        max_frames=spec.quality.max_frames,
        max_decode_s=spec.quality.max_decode_s,
    )
    measured = list(measure_images(samples.collect(rows), limits))
    judge = Judge(spec.quality, len(measured))
    judge.add(0, measured)
    images = judge.finish(len(measured))
    index = samples.index()
    reasons = []
    for number, values in enumerate(samples.values):
        uses = index.uses_T[index.offsets_S1[number] : index.offsets_S1[number + 1]]
        of_images = [images.reasons[images.reasons_U[use]] for use in uses.tolist()]
        reasons.append(sample_reject_reason(of_images, values, spec))
    accepted = np.array([reason is None for reason in reasons], bool)
    ids = np.array([values["sample_id"] for values in samples.values], "S")
    num_usable = int((accepted & (np.char.find(ids, b"-") < 0)).sum()) if len(ids) else 0
    num_train = num_val = 0
    if num_usable > 1:
        wanted_val = max(1, round(val_share * num_usable))
        sizes = replace(spec.split, num_train=num_usable - wanted_val, num_val=wanted_val)
        looks = Looks(images.phash_U, images.colors_UC)
        assigned = assign(
            ids,
            accepted,
            lambda chosen: group_samples(index, looks, chosen, spec.quality),
            sizes,
            np.full(len(ids), NONE, np.int8),
        )
        num_train, num_val = int(assigned.of(TRAIN).sum()), int(assigned.of(VAL).sum())
    first: dict[str, str] = {}
    for reason, values in zip(reasons, samples.values, strict=True):
        if reason is not None:
            first.setdefault(reason, values["source_location"])
    return Preview(
        num_checked=len(reasons),
        num_usable=num_usable,
        reject_reasons=dict(sorted(Counter(filter(None, reasons)).items())),
        first_rejected=first,
        num_train=num_train,
        num_val=num_val,
    )


class _Samples:
    """The samples without their images, and which images they use."""

    def __init__(self) -> None:
        self.values: list[dict[str, Any]] = []
        self._seen: Counter[str] = Counter()
        self._numbers: dict[str, int] = {}
        self._uses: list[int] = []
        self._offsets = [0]

    def collect(self, rows: Iterable[SourceRow]) -> Iterator[bytes]:
        """Give each different image once, in order of first use."""
        for row in rows:
            values = raw_row(row, self._seen)
            for image_id, data in zip(values["image_ids"], values.pop("images"), strict=True):
                is_new = image_id not in self._numbers
                self._uses.append(self._numbers.setdefault(image_id, len(self._numbers)))
                if is_new:
                    yield data
            self._offsets.append(len(self._uses))
            self.values.append(values)

    def index(self) -> ImageIndex:
        return ImageIndex(
            ids=pa.array(list(self._numbers), pa.string()),
            uses_T=np.array(self._uses, np.int32),
            offsets_S1=np.array(self._offsets, np.int64),
            group_samples=[0, len(self.values)],
            group_images=[0, len(self._numbers)],
        )
