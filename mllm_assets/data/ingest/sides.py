"""The splits that a source has itself: in files or folders that are named so, or in a column."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mllm_assets.data.ingest.kinds import KINDS
from mllm_assets.data.ingest.paths import common_folder, find_files
from mllm_assets.data.ingest.source_rows import SourceRow
from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.data.ingest.split_spec import SIDES, TEST, TRAIN, VAL
from mllm_assets.errors import DataError

SIDE_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VAL),
    **dict.fromkeys(("test", "testing"), TEST),
}
Read = Callable[[SourceSpec, Path], Iterator[SourceRow]]


def side_word(path: Path, top: Path) -> str | None:
    """The word for a split in a file's name, else in the innermost folder below `top` that has one.

    Two in one name, as in `train_and_test.csv`, say nothing.
    """
    for name in (path.stem, *path.relative_to(top).parts[-2::-1]):
        words = [word for word in re.findall(r"[a-z]+", name.lower()) if word in SIDE_WORDS]
        if words:
            return words[0] if len(set(words)) == 1 else None
    return None


def side_words(files: Sequence[Path], top: Path) -> dict[str, str]:
    """Side -> the word by which all of these files are named; empty where they are not all named so, or all alike."""
    found = {path: side_word(path, top) for path in files}
    words = {SIDE_WORDS[word]: word for word in found.values() if word}
    one_word_each = len(words) == len({word for word in found.values() if word})
    return words if None not in found.values() and len(words) > 1 and one_word_each else {}


def sides_of(train: str | None, val: str | None, test: str | None) -> dict[str, str]:
    """`split`, `val_split` and `test_split` of a source with these parts; where only test is held out, it validates."""
    if train is None or not (val or test):
        return {}
    sides = {"split": train, "val_split": val or test or ""}
    return {**sides, "test_split": test} if val and test else sides


def read_sides(source: SourceSpec, root: Path, read: Read) -> Iterator[SourceRow]:
    """The rows of a source, each with the side that the source gives it.

    Raises:
        DataError: A file is of no side, its files are of several without the spec saying so, or a row's column names
            none.
    """
    kind = KINDS[source.kind]
    if kind.reads_sides or not kind.has_sides:
        yield from read(source, root)
        return
    if source.split_column is not None:
        for row in read(source, root):
            yield _side_of_row(row, source.split_column)
        return
    index = 0
    for side, part in _parts(source, root):
        for row in read(part, root):
            is_so = row.row_index == index and row.source_split == side  # a copy takes longer than reading a short row
            yield row if is_so else replace(row, row_index=index, source_split=side)
            index += 1


def _side_of_row(row: SourceRow, column: str) -> SourceRow:
    value = row.fields.get(column, "").strip()
    side = SIDE_WORDS.get(value.lower())
    if side is None and row.defect is None:
        return replace(row, defect="split_unknown", detail=f"{column} is {value!r}")
    return replace(row, source_split=side)


def _parts(source: SourceSpec, root: Path) -> list[tuple[str | None, SourceSpec]]:
    files = find_files(source, root)
    top = common_folder(files)
    if source.val_split is None:
        _refuse_mixed(source, files, top)
        return [(None, source)]
    named = zip(SIDES, (source.split, source.val_split, source.test_split), strict=True)
    words = {word: side for side, word in named if word is not None}
    parts: dict[str, list[str]] = {side: [] for side in words.values()}
    for path in files:
        side = words.get(_word_of(path, top, list(words)) or "")
        if side is None:
            raise DataError(
                f"source.path: {path.relative_to(top)} is of none of the splits {', '.join(words)}. "
                "Leave it out of path, or correct split, val_split and test_split in the dataset's YAML."
            )
        parts[side].append(str(path))
    for word, side in words.items():
        if not parts[side]:
            raise DataError(f"source.path: no file is of the split {word!r}. Correct it in the dataset's YAML.")
    alone = {"val_split": None, "test_split": None}
    return [(side, replace(source, path=tuple(paths), **alone)) for side, paths in parts.items()]


def _word_of(path: Path, top: Path, words: Sequence[str]) -> str | None:
    """The one of some words that is in a file's name, else in the innermost folder that has one."""
    for name in (path.stem, *path.relative_to(top).parts[-2::-1]):
        parts = re.findall(r"[a-z]+", name.lower())
        found = [word for word in words if word.lower() == name.lower() or word.lower() in parts]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _refuse_mixed(source: SourceSpec, files: Sequence[Path], top: Path) -> None:
    """Test rows would be trained on. Files that are not all named by their split may be anything."""
    words = side_words(files, top)
    if words:
        named = {word: next(path for path in files if side_word(path, top) == word) for word in words.values()}
        keys = {TRAIN: "split", VAL: "val_split", TEST: "test_split"}
        wanted = {side: words.get(side) for side in SIDES}
        if wanted[VAL] is None:
            wanted |= {VAL: wanted[TEST], TEST: None}
        advice = ", ".join(f"{keys[side]}: {word}" for side, word in wanted.items() if word)
        raise DataError(
            "source.path names files of several splits ("
            + ", ".join(f"{word}: {path.relative_to(top)}" for word, path in named.items())
            + f"), which would be mixed. Keep them apart with `{advice}` in the dataset's YAML, or name the files of "
            "one split in path."
        )
