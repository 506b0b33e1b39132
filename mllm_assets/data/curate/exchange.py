"""Samples for Label Studio and FiftyOne, and the decisions that were made there.

Label Studio: its JSON of tasks (https://labelstud.io/guide/task_format), read from "JSON" and "JSON-MIN" exports.
FiftyOne: what `Dataset.write_json` writes and `Dataset.from_json` reads. What is imported is input from outside.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from mllm_assets.artifacts import write_json_atomic, write_text_atomic
from mllm_assets.data.curate.corrections import DROP, KEEP, RELABEL, Correction, content_id
from mllm_assets.data.curate.review import SourceSample, decisions, pictures, source_samples
from mllm_assets.data.sharegpt.json_text import list_items, object_items
from mllm_assets.decisions import MAX_WHO_CHARS, now_text
from mllm_assets.errors import DataError, MllmAssetsError
from mllm_assets.layout import Layout

LABEL_STUDIO, FIFTYONE = FORMATS = ("label-studio", "fiftyone")
ANSWER, VERDICT = "answer", "verdict"  # the controls of the labelling interface
SOURCE = "source_answer"  # of a task's data
MAX_CHOICES, MAX_CHOICE_CHARS = 50, 100  # of more, or longer, answers a person writes
MAX_IMPORTED = 200_000
_FIELD = "fiftyone.core.fields."
_LABEL_FIELD = f"{_FIELD}EmbeddedDocumentField(fiftyone.core.labels.Classification)"
SAMPLE_FIELDS = {
    "filepath": f"{_FIELD}StringField",
    "tags": f"{_FIELD}ListField({_FIELD}StringField)",
    "metadata": f"{_FIELD}EmbeddedDocumentField(fiftyone.core.metadata.ImageMetadata)",
    "content_id": f"{_FIELD}StringField",
    "location": f"{_FIELD}StringField",
    "ground_truth": _LABEL_FIELD,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What a file says about a sample: another answer or a verdict, or neither."""

    sample_id: str
    answer: str | None = None
    verdict: str | None = None
    who: str | None = None
    when: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """Decisions to record, and how many items of the file say what is decided already, nothing, or of no sample."""

    corrections: list[Correction]
    num_same: int
    num_silent: int
    num_unknown: int


def export_samples(layout: Layout, dataset: str, format: str, path: Path) -> int:
    """Write each sample that has a published picture, with what is decided about it; returns their number.

    For Label Studio the labelling interface is written beside it, with the suffix `.xml`.
    """
    samples = list(source_samples(layout, dataset))
    files = pictures(layout, dataset, {one.sample_id: one.image_id for one in samples})
    shown = [one for one in samples if one.sample_id in files]
    decided = decisions(layout, dataset)
    names = {one: layout_path.relative_to(layout.data).as_posix() for one, layout_path in files.items()}
    if format == FIFTYONE:
        write_json_atomic(
            path,
            {
                "name": dataset,
                "media_type": "image",
                "num_samples": len(shown),
                "sample_fields": SAMPLE_FIELDS,
                "info": {},
                "samples": [_fiftyone(one, names[one.sample_id], decided.get(one.sample_id)) for one in shown],
            },
        )
        return len(shown)
    choices = sorted({one.answer for one in samples if one.answer})
    has_choices = len(choices) <= MAX_CHOICES and all(len(text) <= MAX_CHOICE_CHARS for text in choices)
    control = "choices" if has_choices else "textarea"
    tasks = [_task(one, names[one.sample_id], decided.get(one.sample_id), control) for one in shown]
    write_json_atomic(path, tasks)
    write_text_atomic(path.with_suffix(".xml"), _interface(choices if has_choices else []))
    return len(shown)


def _fiftyone(sample: SourceSample, name: str, decision: Correction | None) -> dict[str, Any]:
    answer = decision.new if decision and decision.action == RELABEL else sample.answer
    label = {"_cls": "Classification", "tags": [], "attributes": {}, "label": answer}
    return {
        "filepath": name,
        "tags": [decision.action] if decision and decision.action in (DROP, KEEP) else [],
        "metadata": None,
        "content_id": sample.sample_id,
        "location": sample.location,
        "ground_truth": label if answer else None,
    }


def _task(sample: SourceSample, name: str, decision: Correction | None, control: str) -> dict[str, Any]:
    def result(of: str, text: str, kind: str) -> dict[str, Any]:
        value = {"choices" if kind == "choices" else "text": [text]}
        return {"id": of, "from_name": of, "to_name": "image", "type": kind, "value": value}

    data = {
        "image": f"/data/local-files/?d={name}",
        "sample_id": sample.sample_id,
        SOURCE: sample.answer,
        "location": sample.location,
    }
    shown = [result(ANSWER, sample.answer, control)] if sample.answer else []
    task: dict[str, Any] = {"data": data, "predictions": [{"model_version": "source", "result": shown}]}
    if decision is not None:
        is_other = decision.action == RELABEL
        made = result(ANSWER, decision.new, control) if is_other else result(VERDICT, decision.action, "choices")
        task["annotations"] = [{"result": [made], "was_cancelled": False}]
    return task


def _interface(choices: list[str]) -> str:
    listed = "".join(f"\n    <Choice value={quoteattr(text)}/>" for text in choices)
    answer = (
        f'<Choices name="{ANSWER}" toName="image" choice="single-radio">{listed}\n  </Choices>'
        if choices
        else f'<TextArea name="{ANSWER}" toName="image" editable="true" maxSubmissions="1"/>'
    )
    return f"""<View>
  <Image name="image" value="$image"/>
  <Text name="source" value="${SOURCE}"/>
  {answer}
  <Choices name="{VERDICT}" toName="image" choice="single">
    <Choice value="{KEEP}"/>
    <Choice value="{DROP}"/>
  </Choices>
</View>
"""


def import_decisions(layout: Layout, dataset: str, format: str, path: Path, *, who: str) -> Imported:
    """Read decisions from a file; `who` made those of which it does not say it.

    Raises:
        DataError: The file is of another form, or one of its answers cannot be trained on. Names the item; none counts.
    """
    known = {one.sample_id: one.answer for one in source_samples(layout, dataset)}
    decided, counts, found = decisions(layout, dataset), Counter[str](), {}
    for number, said in enumerate(_said(path, format), 1):
        try:
            if said is None or (made := _decision(said, known, who)) is None:
                counts["silent"] += 1
            elif said.sample_id not in known:
                counts["unknown"] += 1
            elif (now := decided.get(said.sample_id)) and (now.action, now.new) == (made.action, made.new):
                counts["same"] += 1
            else:
                found[said.sample_id] = made
        except (MllmAssetsError, ValueError) as error:
            raise DataError(f"{path}, item {number}: {error} Nothing was imported.") from None
        if number > MAX_IMPORTED:
            raise DataError(f"{path} has more than {MAX_IMPORTED:,} items. Import it in parts. Nothing was imported.")
    return Imported(
        corrections=list(found.values()),
        num_same=counts["same"],
        num_silent=counts["silent"],
        num_unknown=counts["unknown"],
    )


def _decision(said: Said, known: Mapping[str, str], who: str) -> Correction | None:
    old = known.get(said.sample_id, "")
    common = {"sample_id": said.sample_id, "old": old, "who": said.who or who, "when": said.when or now_text()}
    if said.verdict in (DROP, KEEP):
        return Correction(action=DROP if said.verdict == DROP else KEEP, **common)
    if said.answer is None or not said.answer.strip():
        return None
    return Correction(action=RELABEL, new=said.answer, **common) if said.answer != old else None


def _said(path: Path, format: str) -> Iterator[Said | None]:
    read: Callable[[Any], Said | None] = _of_task if format == LABEL_STUDIO else _of_sample
    try:
        items = list_items(path) if format == LABEL_STUDIO else _samples(path)
        for number, item in enumerate(items, 1):
            try:
                yield read(item)
            except (TypeError, KeyError, AttributeError, ValueError, DataError) as error:
                raise DataError(
                    f"{path}, item {number}: not an item that {format} writes ({type(error).__name__}: {error!s:.80}). "
                    "Nothing was imported."
                ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _samples(path: Path) -> Iterator[Any]:
    for key, value, is_item in object_items(path):
        if key == "samples" and is_item:
            yield value


def _of_sample(item: Any) -> Said | None:
    if item.get("content_id") is None:  # a sample that was added there
        return None
    label = item.get("ground_truth") or {}
    verdicts = [tag for tag in item.get("tags") or [] if tag in (DROP, KEEP)]
    return Said(
        sample_id=content_id(_text(item["content_id"])),
        answer=_text(label["label"]) if label.get("label") is not None else None,
        verdict=DROP if DROP in verdicts else KEEP if verdicts else None,
    )


def _of_task(item: Any) -> Said | None:
    if "data" not in item:  # JSON-MIN: the values of the controls by name
        if "sample_id" not in item:
            return None
        values, made = {name: _first(item[name]) for name in (ANSWER, VERDICT) if item.get(name)}, item
        sample_id, person = item["sample_id"], item.get("annotator")
    else:
        done = [one for one in item.get("annotations") or [] if not one.get("was_cancelled")]
        if not done or "sample_id" not in item["data"]:
            return None
        made = max(done, key=lambda one: str(one.get("updated_at") or ""))
        values = {one["from_name"]: _first(one["value"]) for one in made["result"] if "value" in one}
        sample_id, person = item["data"]["sample_id"], made.get("completed_by")
    answer, when = values.get(ANSWER), made.get("updated_at")
    is_same = answer is not None and answer == (item.get("data") or item).get(SOURCE)  # and a person said so
    return Said(
        sample_id=content_id(_text(sample_id)),
        answer=answer,
        verdict=values.get(VERDICT) or (KEEP if is_same else None),
        who=_person(person),
        when=None if when is None else datetime.fromisoformat(_text(when)).isoformat(timespec="seconds"),
    )


def _first(value: Any) -> str:
    """The text of a control's value: `{"choices": [text]}`, `{"text": [text]}`, a list of it, or the text."""
    if isinstance(value, dict):
        value = value.get("choices") or value.get("text") or ""
    return _text(value[0] if isinstance(value, list) and value else value)


def _person(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("email") or value.get("id")
    name = " ".join(str(value).split()) if isinstance(value, str | int) else ""
    return f"Label Studio's {name}"[:MAX_WHO_CHARS] if name else None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {type(value).__name__}")
    return value
