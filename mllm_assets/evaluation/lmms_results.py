"""What lmms-eval wrote: its samples and figures, and whether each sample holds what the model answered."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_assets.data.sharegpt.json_text import JsonLimits, decode, json_lines, read_text
from mllm_assets.errors import DataError
from mllm_assets.inference.recorder import Exchange

FAILED = "[LMMS_EVAL_"  # what begins an answer of its own making: a request that failed, a budget that is spent
LIMITS = JsonLimits(max_file_bytes=256 * 2**20)
MAX_SAMPLES = 2_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A row of a task.

    Attributes:
        answer: As the model gave it, before the task's filters.
        scores: By metric, those that are a number for each sample.
        pictures: What names the pictures that were shown; None where that is not known.
    """

    task: str
    doc_id: int
    question: str
    target: str
    answer: str
    scores: Mapping[str, float]
    pictures: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Samples in the order in which they were asked, and figures by task and metric.

    Attributes:
        higher_is_better: False by task and metric of those that are better when they are lower.
    """

    samples: tuple[Sample, ...]
    figures: Mapping[str, Mapping[str, float]]
    higher_is_better: Mapping[str, Mapping[str, bool]]


def read_results(output: Path) -> Results:
    """Read what `--log_samples --output_path` wrote.

    Raises:
        DataError: It is not what lmms-eval writes, samples are missing, or a task is of a kind that is not compared.
    """
    found = sorted(output.glob("*/*_results.json"))
    if len(found) != 1:
        raise DataError(f"lmms-eval wrote {len(found)} files of results below {output}, expected one.")
    path = found[0]
    content = decode(read_text(path, LIMITS), path, 1)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object, found {type(content).__name__}.")
    counts, reported = _objects(content, "n-samples", path), _objects(content, "results", path)
    better = content.get("higher_is_better")
    files = {file.name.partition("_samples_")[2].removesuffix(".jsonl"): file for file in _sample_files(path.parent)}
    figures: dict[str, dict[str, float]] = {}
    samples: list[Sample] = []
    for task, count in counts.items():
        if task not in files:
            raise DataError(f"lmms-eval wrote no samples of {task}, so they cannot be compared in pairs.")
        figures[task] = _figures(reported.get(task, {}))
        of_task = list(_samples(files[task], task, figures[task]))
        if len(of_task) != count.get("effective") or not of_task:
            raise DataError(f"lmms-eval wrote {len(of_task)} samples of {task}, and says it has {count}.")
        samples += of_task
    if not samples:
        raise DataError(f"{path} names no task that was asked.")
    lower = {task: _directions(better, task) for task in figures}
    return Results(samples=tuple(samples), figures=figures, higher_is_better=lower)


def _sample_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*_samples_*.jsonl") if path.is_file() and not path.is_symlink()]


def _objects(content: Mapping[str, Any], key: str, path: Path) -> dict[str, dict[str, Any]]:
    value = content.get(key)
    if not isinstance(value, dict) or not all(isinstance(one, dict) for one in value.values()):
        raise DataError(f"{path}: expected {key!r} to be an object of objects. Another lmms-eval may write it so.")
    return value


def _directions(better: Any, task: str) -> dict[str, bool]:
    of_task = better.get(task) if isinstance(better, dict) else None
    return {name: value is not False for name, value in of_task.items()} if isinstance(of_task, dict) else {}


def _figures(reported: Mapping[str, Any]) -> dict[str, float]:
    """`right,none` is the metric `right` after the filter `none`."""
    found: dict[str, float] = {}
    for key, value in reported.items():
        name, _, rest = key.partition(",")
        if rest and not name.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")) and _is_number(value):
            found.setdefault(name, float(value))
    return found


def _samples(path: Path, task: str, metrics: Mapping[str, float]) -> Iterator[Sample]:
    known: set[int] = set()
    for line in json_lines(path, LIMITS):
        row = line.value
        if line.problem or not isinstance(row, dict):
            raise DataError(line.problem or f"{path}, line {line.number}: expected an object.")
        doc_id = row.get("doc_id")
        if not isinstance(doc_id, int) or isinstance(doc_id, bool):
            raise DataError(f"{path}, line {line.number}: expected a number as doc_id, found {doc_id!r:.40}.")
        answer = _one_text(row.get("resps", row.get("filtered_resps")))
        if answer is None or doc_id in known:
            raise DataError(
                f"{task} asks about one row several times, or filters answers in several ways, which is not compared "
                "here. Leave it out of benchmarks.tasks."
            )
        known.add(doc_id)
        if len(known) > MAX_SAMPLES:
            raise DataError(f"{task} has more than {MAX_SAMPLES:,} rows. Set benchmarks.limit.")
        yield Sample(
            task=task,
            doc_id=doc_id,
            question=str(row.get("input", "")),
            target=str(row.get("target", "")),
            answer=answer,
            scores={name: float(row[name]) for name in metrics if _is_number(row.get(name))},
        )


def _one_text(value: Any) -> str | None:
    """lmms-eval writes the only answer of a row as a text, or as a list of a list of it."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) and math.isfinite(value)


def require_answered(samples: Sequence[Sample], said: Sequence[Exchange]) -> None:
    """Refuse figures that count a request that failed as a wrong answer, as lmms-eval does.

    Raises:
        DataError: A sample's answer is none that the model gave. Says how many, and why.
    """
    missing = Counter(sample.answer for sample in samples)
    missing -= Counter(one.answer for one in said if one.answer is not None)
    if not (num_missing := missing.total()):
        return
    problems = [one.problem for one in said if one.problem]
    texts = [text for text in missing if text.startswith(FAILED)]
    why = problems[0] if problems else next(iter(texts), "the model was not asked")
    raise DataError(
        f"{num_missing} of {len(samples)} questions were not answered, which lmms-eval counts as wrong answers, so "
        f"that its figures are not used. The first: {why[:400]}"
    )


def with_pictures(samples: Sequence[Sample], said: Sequence[Exchange]) -> tuple[Sample, ...]:
    """The samples with what they showed, where the model was asked them in their order, and nothing else."""
    answered = [one for one in said if one.answer is not None]
    if [one.answer for one in answered] != [sample.answer for sample in samples]:
        return tuple(samples)
    pairs = zip(samples, answered, strict=True)
    return tuple(replace(sample, pictures=" ".join(one.pictures)) for sample, one in pairs)
