"""Metrics for answers that are read off a picture: short texts, JSON objects and boxes.

Each is computed where all references of an entry are of its kind, and for no other entry.
"""

import json
import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from mllm_assets.evaluation.scores import Answers, Metric, register

ANLS_THRESHOLD = 0.5
MAX_TRANSCRIPT_CHARS = 1000  # beyond, an edit distance says little about a caption
Box = tuple[float, float, float, float]  # left, top, right, bottom

_FENCE = re.compile(r"^\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*$", re.DOTALL | re.IGNORECASE)
_NUMBER = r"-?\d+(?:\.\d+)?"
# [1, 2, 3, 4] of Qwen, Molmo and others, (1,2),(3,4) of Qwen-VL, <loc0001>... of PaliGemma
_BOX = re.compile(
    rf"[\[(]\s*({_NUMBER})\s*,\s*({_NUMBER})\s*(?:,|\)\s*,\s*\()\s*({_NUMBER})\s*,\s*({_NUMBER})\s*[\])]"
    r"|<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>"
)


def _of_texts(score: Callable[[str, str], float], given: Answers) -> np.ndarray | None:
    """For references to transcribe; where there are labels, accuracy says more."""
    if given.labels or max(map(len, given.references), default=0) > MAX_TRANSCRIPT_CHARS:
        return None
    return np.array([score(a, r) for a, r in zip(given.answers, given.references, strict=True)])


def anls(answer: str, reference: str) -> float:
    """1 - normalised edit distance, 0 where that is below a half; case and outer white space aside.

    Source:
        Biten et al. 2019, "Scene Text Visual Question Answering", section 4.3 (DocVQA's metric too).
    """
    from rapidfuzz.distance import Levenshtein

    similarity = Levenshtein.normalized_similarity(answer.strip().lower(), reference.strip().lower())
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def character_error_rate(answer: str, reference: str) -> float:
    """Edits from the answer to the reference for each of its characters, outer white space aside; may be above 1."""
    from rapidfuzz.distance import Levenshtein

    right = reference.strip()
    return Levenshtein.distance(answer.strip(), right) / max(len(right), 1)


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, in a Markdown fence or not."""
    fenced = _FENCE.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def fields_of(value: Any, path: str = "") -> set[tuple[str, str]]:
    """Path and value of every leaf; the items of a list have no order."""
    if isinstance(value, dict) and value:
        return {leaf for key, item in value.items() for leaf in fields_of(item, f"{path}.{key}")}
    if isinstance(value, list) and value:
        return {leaf for item in value for leaf in fields_of(item, f"{path}[]")}
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return {(path, " ".join(text.split()))}


def _json_scores(given: Answers, score: Callable[[dict[str, Any] | None, dict[str, Any]], float]) -> np.ndarray | None:
    references = [json_object(text) for text in given.references]
    if not references or None in references:
        return None
    pairs = zip(map(json_object, given.answers), references, strict=True)
    return np.array([score(answer, reference or {}) for answer, reference in pairs])


def _field_f1(answer: dict[str, Any] | None, reference: dict[str, Any]) -> float:
    if answer is None:
        return 0.0
    said, right = fields_of(answer), fields_of(reference)
    return 2 * len(said & right) / (len(said) + len(right))


def _has_shape(answer: Any, reference: Any) -> bool:
    """Whether it has the reference's keys and kinds of values; lists may have other lengths."""
    if isinstance(reference, dict):
        known = isinstance(answer, dict) and answer.keys() == reference.keys()
        return known and all(_has_shape(answer[key], value) for key, value in reference.items())
    if isinstance(reference, list):
        return isinstance(answer, list) and (not reference or all(_has_shape(item, reference[0]) for item in answer))
    numbers = (int, float)
    if isinstance(reference, numbers) and not isinstance(reference, bool):
        return isinstance(answer, numbers) and not isinstance(answer, bool)
    return reference is None or answer is None or type(answer) is type(reference)


def boxes_in(text: str) -> list[Box]:
    """The boxes that a text names, each with its corners in order."""
    found = []
    for match in _BOX.finditer(text):
        groups = match.groups()
        # PaliGemma writes top, left, bottom, right
        a, b, c, d = map(float, groups[:4] if groups[0] is not None else (groups[5], groups[4], groups[7], groups[6]))
        found.append((min(a, c), min(b, d), max(a, c), max(b, d)))
    return found


def box_iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (areas - shared) if areas > shared else float(one == other)


def match_boxes(said: Sequence[Box], right: Sequence[Box]) -> float:
    """The sum of the best one-to-one matches' IoU for each box of the longer list: missing and surplus ones count 0."""
    from scipy.optimize import linear_sum_assignment

    if not said:
        return 0.0
    overlap = np.array([[box_iou(one, other) for other in right] for one in said])
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    return float(overlap[rows, columns].sum()) / max(len(said), len(right))


def _box_scores(given: Answers) -> np.ndarray | None:
    right = [boxes_in(text) for text in given.references]
    if not right or not all(right):
        return None
    return np.array([match_boxes(boxes_in(text), boxes) for text, boxes in zip(given.answers, right, strict=True)])


def _edit_definition(what: str) -> Callable[[], str]:
    return lambda: f"rapidfuzz {version('rapidfuzz')}, {what}"


for _entry in (
    Metric(
        name="anls",
        unit="0 to 1",
        definition=_edit_definition("mean of 1 - edit distance / length, below 0.5 counts as 0, lower case"),
        score=lambda given: _of_texts(anls, given),
    ),
    Metric(
        name="character_error_rate",
        unit="0 and more",
        definition=_edit_definition("mean edits for each character of the reference"),
        higher_is_better=False,
        score=lambda given: _of_texts(character_error_rate, given),
    ),
    Metric(
        name="json_valid",
        unit="0 to 1",
        definition="share of answers that are a JSON object with the reference's keys and kinds of values",
        score=lambda given: _json_scores(given, lambda answer, right: float(_has_shape(answer, right))),
    ),
    Metric(
        name="json_field_f1",
        unit="0 to 1",
        definition="mean F1 over the fields of the JSON objects: equal paths with equal values, lists without order",
        headline=True,
        score=lambda given: _json_scores(given, _field_f1),
    ),
    Metric(
        name="box_iou",
        unit="0 to 1",
        definition="mean intersection over union of the boxes, matched one to one; missing and surplus boxes count 0",
        headline=True,
        score=_box_scores,
    ),
):
    register(_entry)
