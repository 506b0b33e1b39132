"""Look through a LLaMA-Factory directory before anything trains on it: every entry, row and image."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mllm_assets.data.dataset_info import Entry, load_entries
from mllm_assets.data.sharegpt import ASSISTANT, USER, Row, entry_problems, parse_rows
from mllm_assets.data.tokens import IMAGE_PLACEHOLDER, text_defect
from mllm_assets.errors import MllmAssetsError
from mllm_assets.quality.measure import measure_files
from mllm_assets.quality.probes import OWN_FILES

_ADVICE = {
    "control_token": "holds a control token of the model. Take it out of the text.",
    "control_character": "holds a control character. Take it out of the text.",
    "undecodable": "holds a character that could not be read. Write the text again from where it came.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryReport:
    """What was found in an entry; it can be trained on where there are no problems, warnings or not."""

    name: str
    num_rows: int
    num_images: int
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def check_directory(data_dir: Path) -> Iterator[EntryReport]:
    """Each entry of `dataset_info.json`: its rows as training reads them, and every image decoded.

    Raises:
        DataError: There is no `dataset_info.json`, or it is not JSON.
    """
    for entry in load_entries(data_dir).values():
        yield _check(data_dir, entry)


def _check(data_dir: Path, entry: Entry) -> EntryReport:
    problems = entry_problems(entry)
    warnings: list[str] = []
    rows: list[Row] = []
    num_rows = 0
    if not problems:
        try:
            for row, found in parse_rows(data_dir, entry):
                num_rows += 1
                problems += found
                if row is not None and not found:
                    rows.append(row)
                    problems += _text_problems(row, entry)
                    warnings += _empty_answers(row, entry)
            if not num_rows:
                problems.append(f"Entry {entry.name!r} has no rows. Add samples, or remove the entry.")
        except MllmAssetsError as error:
            problems.append(str(error))
    users: dict[Path, str] = {}
    for row in rows:
        for image in row.images:
            users.setdefault(image, row.id)
    for path, image in zip(users, measure_files(list(users), OWN_FILES, None), strict=True):
        if image.defect is not None:
            problems.append(
                f"{path} ({users[path]}): {image.defect}. Training would end there: replace it, or take the row out."
            )
    return EntryReport(
        name=entry.name,
        num_rows=num_rows,
        num_images=len(users),
        problems=tuple(problems),
        warnings=tuple(warnings),
    )


def _text_problems(row: Row, entry: Entry) -> Iterator[str]:
    for number, message in enumerate(row.messages):
        text = message.content.replace(IMAGE_PLACEHOLDER, "") if message.role == USER else message.content
        if defect := text_defect(text):
            yield f"Entry {entry.name!r}, {row.id}, message {number}: {_ADVICE[defect]}"


def _empty_answers(row: Row, entry: Entry) -> Iterator[str]:
    for number, message in enumerate(row.messages):
        if message.role == ASSISTANT and not message.content.strip():
            yield (
                f"{entry.file_name} ({row.id}), message {number}: the answer is empty, and teaches the model to end "
                f"its turn at once. Write it, or take the row out."
            )
