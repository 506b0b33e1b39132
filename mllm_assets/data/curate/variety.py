"""Whether the rows of a dataset say different things: where they do not, a model learns to answer without looking."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import read_manifest
from mllm_assets.data.curate.checks import CheckOutcome
from mllm_assets.data.curate.splits import split_file
from mllm_assets.data.ingest.spec import TRAIN
from mllm_assets.data.ingest.templates import names_in
from mllm_assets.data.sharegpt.conversation import ASSISTANT, IMAGE_PLACEHOLDER, USER
from mllm_assets.data.sharegpt.row_files import read_rows
from mllm_assets.progress import doing


def digest_of(text: str) -> bytes:
    """8 bytes instead of a text, so that all of them fit into memory."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


def variety_warnings(answers: Counter[bytes], questions: Counter[bytes]) -> tuple[str, ...]:
    """What is odd about the answers, and about the questions where rows have their own."""
    found = []
    total, most = answers.total(), max(answers.values(), default=0)
    if total > 1 and most == total:
        found.append(f"all {total} answers are equal: a model learns to say it without looking")
    elif total > 3 and most * 2 >= total:
        found.append(f"half of the answers are equal ({most} of {total}): a model learns to say it without looking")
    if questions.total() > 1 and len(questions) == 1:
        found.append(f"no two rows ask a question of their own: all {questions.total()} ask the same")
    return tuple(found)


@doing("compare answers")
def rows_say_different_things(version_dir: Path) -> CheckOutcome:
    """The training rows' answers are not all, nor half of them, the same; nor are their own questions.

    Raises:
        IntegrityError: The version was never finished.
        DataError: Its file is not JSON.
    """
    spec = read_manifest(version_dir)["spec"]
    answers, questions = Counter[bytes](), Counter[bytes]()
    for row in read_rows(version_dir / split_file(TRAIN, spec["output"]["format"])):
        if "augmentation" in row:
            continue
        answers[digest_of(_last(row["messages"], ASSISTANT))] += 1
        if _asks_itself(spec):
            questions[digest_of(_last(row["messages"], USER).replace(IMAGE_PLACEHOLDER, ""))] += 1
    found = variety_warnings(answers, questions)
    numbers = {"num_different_answers": len(answers), "num_different_questions": len(questions)}
    fine = f"{len(answers)} different answers in {answers.total()} rows."
    return CheckOutcome(passed=not found, description="; ".join(found) or fine, metadata=numbers)


def _last(messages: list[dict[str, Any]], role: str) -> str:
    return next((str(turn["content"]) for turn in reversed(messages) if turn["role"] == role), "")


def _asks_itself(spec: dict[str, Any]) -> bool:
    """Whether the questions are the source's, and not the prompts of the YAML."""
    return not spec["prompts"] or any(names_in(prompt) for prompt in spec["prompts"])
