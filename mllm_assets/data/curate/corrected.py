"""Decisions meet a source: which of them hold for it, and its rows with the answers that people gave.

What a decision corrects is what the model is to answer: the value of the one name in the dataset's `answer`, all of it
where it has several, or the last answer of a conversation. Ids and images stay, and so every sample keeps its side.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from mllm_assets.artifacts import digest_json, point_symlink, publish, read_manifest, staging_directory, write_manifest
from mllm_assets.data.curate.corrections import (
    DROP,
    KEEP,
    RELABEL,
    Action,
    Correction,
    content_id,
    corrections_digest,
    in_force,
    read_corrections,
)
from mllm_assets.data.ingest.raw_files import read_raw, read_texts
from mllm_assets.data.ingest.spec import DatasetSpec, OutputSpec, QualitySpec, SourceSpec, as_json
from mllm_assets.data.ingest.split_spec import SplitSpec
from mllm_assets.data.ingest.templates import names_in
from mllm_assets.data.quality.verdicts import CORRECTED, render_answer, text_reject_reason, texts_of
from mllm_assets.data.sharegpt.conversation import ASSISTANT, answers_of, conversation_defect, read_conversation
from mllm_assets.errors import DataError, IntegrityError
from mllm_assets.layout import Layout

SETTLED_FILE, LATEST = "corrections.json", "latest"
COLUMNS = ("sample_id", "image_ids", "caption", "label", "messages", "source_defect", "source_location", "fields")
GONE, OTHER_ANSWER = "no sample with this content", "its answer in the source is another one now"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """A decision that changes what is trained: `new` answer, or drop.

    `reject_reason` is why the sample was rejected for its answer alone, which the new one makes up for.
    """

    sample_id: str
    action: Action
    new: str = ""
    reject_reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SettledResult:
    """The decisions that hold for a source, in `directory`, and how many; `unmatched` are the others, each with why.

    `digest` covers what they change and nothing else: a sample that is right as it is makes nothing outdated.
    """

    directory: Path
    digest: str
    decisions_digest: str
    num_relabelled: int
    num_dropped: int
    num_kept: int
    unmatched: Sequence[tuple[Correction, str]]


def answering(spec: DatasetSpec) -> list[Any]:
    """What of a dataset's description decides what an answer is, and whether it can be trained on."""
    return [spec.answer, spec.prompts, spec.quality.max_caption_chars, spec.source.label_column]


def answer_of(sample: Mapping[str, Any], spec: DatasetSpec) -> str:
    """What a decision about an ingested row would correct; "" where the source has none."""
    if sample["messages"] is not None:
        turns = [turn for turn in json.loads(sample["messages"]) if isinstance(turn, dict)]
        answers = [turn.get("content") for turn in turns if turn.get("role") == ASSISTANT]
        return answers[-1] if answers and isinstance(answers[-1], str) else ""
    names = names_in(spec.answer)
    return (texts_of(sample).get(names[0]) or "") if len(names) == 1 else render_answer(sample, spec)


def with_answer(sample: Mapping[str, Any], new: str, spec: DatasetSpec) -> dict[str, Any]:
    """An ingested row with another answer."""
    if sample["messages"] is not None:
        turns = read_conversation(sample["messages"])
        last = max(number for number, turn in enumerate(turns) if turn["role"] == ASSISTANT)
        messages = json.dumps([*turns[:last], {**turns[last], "content": new}, *turns[last + 1 :]])
        return {**sample, "messages": messages, "caption": answers_of(messages)}
    names = names_in(spec.answer)
    if len(names) != 1:  # a label that the answer no longer says is no truth to compare with
        label = sample["label"] if (texts_of(sample)["label"] or "") in new else None
        return {**sample, "label": label, CORRECTED: new}
    if names[0] in ("caption", "label"):
        return {**sample, names[0]: new}
    fields = json.loads(sample["fields"]) if sample["fields"] else {}
    return {**sample, "fields": json.dumps({**fields, names[0]: new})}


def _defect(sample: Mapping[str, Any], spec: DatasetSpec) -> str | None:
    num_images = len(sample["image_ids"])
    if sample["messages"] is not None:
        return conversation_defect(sample["messages"], num_images, spec.quality.max_caption_chars)
    return text_reject_reason(sample, num_images, spec)


def settle(spec: DatasetSpec, layout: Layout, raw: Path) -> SettledResult:
    """Find which decisions hold for an ingested source, and publish those that change something.

    Raises:
        DataError: A new answer cannot be trained on in this dataset. Names the sample.
        IntegrityError: The file of decisions is damaged, or `raw` was never finished.
    """
    decisions_digest = corrections_digest(layout, spec.name)  # before it is read: what is added meanwhile counts as new
    decided = in_force(read_corrections(layout, spec.name))
    raw_digest = read_manifest(raw)["digest"]
    settled: dict[str, Settled] = {}
    left = {sample_id: (one, GONE) for sample_id, one in decided.items()}
    kept = set()
    for sample in read_texts(raw, COLUMNS) if decided else ():
        sample_id = content_id(sample["sample_id"])
        if (one := decided.get(sample_id)) is None or sample_id in settled:
            continue
        if one.action == RELABEL and answer_of(sample, spec) != one.old:
            left[sample_id] = (one, OTHER_ANSWER)
            continue
        left.pop(sample_id, None)
        if one.action == KEEP:
            kept.add(sample_id)
        else:
            settled[sample_id] = _settled(one, sample, spec)
    rows = [asdict(settled[sample_id]) for sample_id in sorted(settled)]
    digest = digest_json(rows)[:16] if rows else "none"
    return SettledResult(
        directory=_publish(spec, layout, raw_digest, rows),
        digest=digest,
        decisions_digest=decisions_digest,
        num_relabelled=sum(one.action == RELABEL for one in settled.values()),
        num_dropped=sum(one.action == DROP for one in settled.values()),
        num_kept=len(kept),
        unmatched=list(left.values()),
    )


def check_answers(spec: DatasetSpec, raw: Path, corrections: Sequence[Correction]) -> None:
    """Refuse new answers before they are recorded.

    Raises:
        DataError: One cannot be trained on in this dataset. Names the sample.
    """
    left = {one.sample_id: one for one in corrections if one.action == RELABEL}
    for sample in read_texts(raw, COLUMNS) if left else ():
        if (one := left.pop(content_id(sample["sample_id"]), None)) is not None:
            _settled(one, sample, spec)


def _settled(one: Correction, sample: Mapping[str, Any], spec: DatasetSpec) -> Settled:
    if one.action == DROP:
        return Settled(sample_id=one.sample_id, action=DROP)
    before = _defect(sample, spec)
    if before is not None and sample["messages"] is not None:
        return Settled(sample_id=one.sample_id, action=RELABEL, new=one.new)  # its other turns may be unreadable
    defect = _defect(with_answer(sample, one.new, spec), spec)
    if defect is not None and before is None:
        raise DataError(
            f"{one.sample_id} ({sample['source_location']}): the new answer of {one.who} cannot be trained on "
            f"({defect}). Give another, or take it back: mllm-assets review {spec.name} undo {one.sample_id}"
        )
    is_made_up_for = defect is None and before is not None and sample["source_defect"] is None
    return Settled(
        sample_id=one.sample_id, action=RELABEL, new=one.new, reject_reason=before if is_made_up_for else None
    )


def _publish(spec: DatasetSpec, layout: Layout, raw_digest: str, rows: list[dict[str, Any]]) -> Path:
    described = as_json(spec)
    directory = layout.settled(spec.name, digest_json([described, raw_digest, rows])[:16])
    with staging_directory(directory.parent) as staging:
        (staging / SETTLED_FILE).write_bytes(orjson.dumps(rows, option=orjson.OPT_INDENT_2))
        write_manifest(
            staging, {"kind": "corrections", "dataset": spec.name, "raw_digest": raw_digest, "spec": described}
        )
        publish(staging, directory)
    point_symlink(layout.settled(spec.name, LATEST), directory)
    return directory


def find_source(layout: Layout, dataset: str) -> tuple[DatasetSpec, Path]:
    """A dataset's description and ingested source, as they were when decisions about it last met them.

    Raises:
        DataError: They never did. Gives the command.
    """
    latest = layout.settled(dataset, LATEST)
    try:
        manifest = read_manifest(latest)
        raw = layout.raw(dataset, manifest["raw_digest"])
        read_manifest(raw)
        return spec_of(manifest["spec"]), raw
    except IntegrityError:
        raise DataError(f"{dataset} has no samples to review yet. Make it: mllm-assets run {dataset}") from None


def spec_of(values: Mapping[str, Any]) -> DatasetSpec:
    """The opposite of `as_json`."""
    parts = {"source": SourceSpec, "split": SplitSpec, "quality": QualitySpec, "output": OutputSpec}
    return DatasetSpec(
        **{name: parts[name](**value) if name in parts else _frozen(value) for name, value in values.items()}
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class CorrectedSource:
    """The rows of an ingested source with the answers that people gave; reading it again gives the same.

    Args:
        spec: The dataset.
        raw: The source.
        settled: What `settle` published, or None for the source as it is.
    """

    def __init__(self, spec: DatasetSpec, raw: Path, settled: Path | None = None) -> None:
        self.raw = raw
        self._spec = spec
        self._settled: dict[str, Settled] = {}
        if settled is not None:
            manifest = read_manifest(settled)
            if manifest["raw_digest"] != read_manifest(raw)["digest"]:
                raise IntegrityError(
                    f"{settled} holds for the source {manifest['raw_digest']}, but {raw} was ingested since. "
                    f"Materialise {spec.name}/corrections again."
                )
            rows = [Settled(**row) for row in orjson.loads((settled / SETTLED_FILE).read_bytes())]
            self._settled = {one.sample_id: one for one in rows}

    def actions(self, sample_ids: Sequence[str]) -> NDArray[np.object_]:
        """What was decided about each sample: relabel, drop, or None."""
        found = [self._of(sample_id) for sample_id in sample_ids]
        return np.array([one and one.action for one in found], object)

    def makes_up_for(self, sample_id: str, reject_reason: str) -> bool:
        """Whether a new answer is all that a rejected sample lacked."""
        one = self._of(sample_id)
        return one is not None and one.reject_reason == reject_reason

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for sample in read_raw(self.raw):
            one = self._of(sample["sample_id"])
            is_other = one is not None and one.action == RELABEL
            yield with_answer(sample, one.new, self._spec) if one is not None and is_other else sample

    def _of(self, sample_id: str) -> Settled | None:
        return self._settled.get(content_id(sample_id)) if self._settled else None
