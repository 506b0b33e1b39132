"""`report.html` of a version: pages through all samples of a dataset, filtered and searched, from the disk alone.

The page holds no sample: they are a script beside it, one line each, and the pictures are the dataset's own files.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import orjson
import pyarrow as pa

from mllm_assets.artifacts import write_text_atomic
from mllm_assets.data.curate.assign import SPLITS, UNUSED, UNUSED_REASONS, Assignments
from mllm_assets.data.quality.report import thumbnail
from mllm_assets.data.sharegpt.conversation import IMAGE_PLACEHOLDER
from mllm_assets.errors import DataError
from mllm_assets.pages import page_template

REPORT, SAMPLES = "report.html", "report_samples.js"
MAX_SAMPLES = 50_000  # about 0.5 KB each
MAX_THUMBNAILS, THUMBNAIL_PX = 500, 160  # of samples in no split, whose pictures are not published; about 4 KB each
MAX_TEXT_CHARS = 500
OF_PICTURES = (
    "image_"  # how the reasons begin for which a picture was rejected, some of which a decoder may not survive
)


class SamplePage:
    """Collects the samples of a version in the order of the source, and writes the page.

    Args:
        folder: Where what was collected is until it is written.
        assignments: The split of each sample.
        verdicts: The columns `reject_reason` and `flags` of each sample.
    """

    def __init__(self, folder: Path, assignments: Assignments, verdicts: pa.Table) -> None:
        self._file: IO[bytes] = TemporaryFile(dir=folder)
        self._assignments = assignments
        shown = verdicts.slice(0, MAX_SAMPLES)
        self._verdicts = zip(shown["reject_reason"].to_pylist(), shown["flags"].to_pylist(), strict=True)
        self._num_added = self._num_thumbnails = 0

    def add(self, sample: Mapping[str, Any], row: Mapping[str, Any] | None) -> None:
        """Add the next sample as it was ingested, with the row that is written of it; None where it is in no split."""
        number, self._num_added = self._num_added, self._num_added + 1
        if number >= MAX_SAMPLES:
            return
        split = SPLITS[self._assignments.splits_S[number]]
        reason, flags = next(self._verdicts)
        if split == UNUSED:
            reason = UNUSED_REASONS[self._assignments.reasons_S[number]]
        if row is None:
            asked, said, label = "", sample["caption"] or sample["messages"] or "", sample["label"]
            is_sound = split == UNUSED or (sample["source_defect"] is None and not reason.startswith(OF_PICTURES))
            picture = self._thumbnail(sample) if is_sound else None
        else:
            turns = [(turn["role"], turn["content"]) for turn in row["messages"]]
            asked = " ".join(text for role, text in turns if role == "user").replace(IMAGE_PLACEHOLDER, "").strip()
            said, label, picture = turns[-1][1], row.get("label"), next(iter(row["images"]), None)
        place = _cut(sample["source_location"])
        values = [sample["sample_id"][:16], place, split, reason, flags or [], label, _cut(asked), _cut(said), picture]
        self._file.write(orjson.dumps(values) + b",\n")

    def _thumbnail(self, sample: Mapping[str, Any]) -> str | None:
        if not sample["images"] or self._num_thumbnails == MAX_THUMBNAILS:
            return None
        self._num_thumbnails += 1
        with suppress(DataError):
            return thumbnail(sample["images"][0], THUMBNAIL_PX)
        return None

    def write(self, version: Path, quality: Path, *, dataset: str) -> Path:
        """Write the page and its script into a finished version; returns the page's path."""
        write_text_atomic(version / SAMPLES, self._script())
        page = page_template("mllm_assets.data.curate", "report.html.jinja").render(
            dataset=dataset,
            counts={split: int(self._assignments.of(split).sum()) for split in SPLITS},
            num_shown=min(self._num_added, MAX_SAMPLES),
            samples=SAMPLES,
            quality=(quality / REPORT).relative_to(version.parents[2]).as_posix(),  # below data/
        )
        write_text_atomic(version / REPORT, page)
        return version / REPORT

    def _script(self) -> Iterator[str]:
        self._file.seek(0)
        yield "window.SAMPLES = [\n"
        yield from (line.decode() for line in self._file)
        yield "];\n"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT_CHARS else f"{text[: MAX_TEXT_CHARS - 1]}…"
