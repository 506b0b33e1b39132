"""Every file of a folder, and what it is: pictures, texts, files of rows, tars, and why the others are not read."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from mllm_assets.data.curate.columns import IMAGES, Undecided
from mllm_assets.data.ingest.image_folder import CAPTION_SUFFIXES
from mllm_assets.data.ingest.sides import SIDE_WORDS, side_word
from mllm_assets.data.ingest.source_rows import FILE_COLUMNS
from mllm_assets.data.sharegpt.formats import Format, format_of, require_format
from mllm_assets.data.sharegpt.pictures import IMAGE_SUFFIXES, folded, stems_of

MAX_NAMED_FOLDERS = 5
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# what `datasets` writes beside its .arrow files, and what other tools write beside data
SIDECARS = frozenset(
    "state.json dataset_info.json dataset_dict.json dataset_infos.json _success thumbs.db desktop.ini readme.txt "
    "license.txt requirements.txt config.json".split()
)
UNPACK = "unpack it"
NOT_PICTURES = {".svg": "SVG, which has no pixels", ".pdf": "PDF", ".psd": "PSD", ".eps": "EPS",
                ".raw": "a camera's raw file", ".cr2": "a camera's raw file", ".nef": "a camera's raw file",
                ".dng": "a camera's raw file", ".mp4": "a video", ".mov": "a video", ".webm": "a video",
                ".avi": "a video", ".mp3": "a sound", ".wav": "a sound", ".zip": f"a ZIP archive: {UNPACK}",
                ".7z": f"an archive: {UNPACK}", ".rar": f"an archive: {UNPACK}",
                ".gz": f"a compressed file: {UNPACK}"}  # fmt: skip


@dataclass(kw_only=True, slots=True)
class Inventory:
    """The files of a folder by what they are; `hidden` are only counted."""

    folder: Path
    pictures: list[Path] = field(default_factory=list)
    texts: list[Path] = field(default_factory=list)
    rows: dict[Path, Format] = field(default_factory=dict)
    tars: list[Path] = field(default_factory=list)
    not_read: dict[Path, str] = field(default_factory=dict)
    num_hidden: int = 0

    @property
    def num_files(self) -> int:
        found = (self.pictures, self.texts, self.rows, self.tars, self.not_read)
        return sum(map(len, found)) + self.num_hidden

    def media_dirs(self, names: Iterable[str], rows: Path, *, most: int | None = None) -> list[Path]:
        """The fewest folders below which some names are, at most so many, that of most first; none where it is beside.

        A name without a suffix is a picture's by its stem. `rows` is the file that names them: where a name is below
        several folders, its own comes first, then that of its split.

        Raises:
            Undecided: A name is below several others. Lists them.
        """
        beside, side = rows.parent, SIDE_WORDS.get(side_word(rows, self.folder) or "")
        wanted = [name.replace("\\", "/").removeprefix("./") for name in names]
        wanted = [name for name in wanted if not os.path.isabs(name)]
        lasts = {name.rstrip("/").rpartition("/")[2] for name in wanted}
        by_name: dict[str, list[Path]] = {folded(stem): [] for last in lasts for stem in stems_of(last)}
        for path in self.pictures:
            for key in {folded(path.name), folded(path.stem)} & by_name.keys():
                by_name[key].append(path)
        folders: dict[Path, set[str]] = defaultdict(set)
        for name in wanted:
            parts = [part for part in name.split("/") if part]
            stems = {folded(stem) for stem in stems_of(parts[-1])} if parts else set[str]()
            for path in (path for stem in sorted(stems) for path in by_name.get(stem, [])):
                root = path
                for part, own in zip(reversed(parts), reversed(path.parts), strict=False):
                    if not (stems if root is path else {folded(part)}) & {folded(own), folded(Path(own).stem)}:
                        break
                    root = root.parent
                else:
                    folders[root].add(name)
        left, chosen = set(wanted), list[Path]()
        while left and folders and len(chosen) != most:
            num_names = max(len(here & left) for here in folders.values())
            if not num_names:
                break
            best = [root for root, here in folders.items() if len(here & left) == num_names]
            best.sort(key=lambda root: (len(root.parts), root))
            closer = [root for root in best if root == beside] or [
                root for root in best if side and SIDE_WORDS.get(side_word(root, self.folder) or "") == side
            ]
            chosen.append((closer or best)[0])
            if not closer:
                self._require_one(folders, chosen[-1])
            left -= folders.pop(chosen[-1])
        return [] if chosen == [beside] else chosen

    def _require_one(self, folders: Mapping[Path, set[str]], chosen: Path) -> None:
        for name in sorted(folders[chosen]):
            several = sorted(root for root, names in folders.items() if name in names)
            if len(several) > 1:
                shown = [root.relative_to(self.folder).as_posix() for root in several[:MAX_NAMED_FOLDERS]]
                more = f" and {len(several) - len(shown)} more" if len(several) > len(shown) else ""
                raise Undecided(
                    f"{name!r} is the name of a picture in each of {', '.join(shown)}{more}. Choose with --media-dir "
                    "FOLDER, or write the folder into the rows."
                )


def take_inventory(folder: Path) -> Inventory:
    """Classify every file below a folder; only the beginning of files that may hold rows is read."""
    found = Inventory(folder=folder)
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith("."):
                found.num_hidden += 1
            else:
                _classify(path, found)
    return found


def _classify(path: Path, found: Inventory) -> None:
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        found.pictures.append(path)
    elif path.name.lower().endswith(TAR_SUFFIXES):
        found.tars.append(path)
    elif not path.is_file():
        found.not_read[path] = "neither a file nor a link to one"
    elif suffix in NOT_PICTURES:
        found.not_read[path] = NOT_PICTURES[suffix]
    elif path.name.lower() in SIDECARS or suffix in (".md", ".py", ".ipynb", ".yaml", ".yml", ".lock", ".html"):
        found.not_read[path] = "holds no rows"
    else:
        try:
            format = format_of(path)
        except OSError as error:
            found.not_read[path] = f"cannot be opened ({error.strerror})"
            return
        if format is None and suffix in (".csv", ".tsv") and path.stat().st_size:
            format = require_format(path)
        if format is not None and (suffix not in CAPTION_SUFFIXES or _is_table(path, format)):
            found.rows[path] = format
        elif suffix in CAPTION_SUFFIXES:
            found.texts.append(path)
        elif suffix in (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow"):
            found.not_read[path] = "it is empty" if not path.stat().st_size else "it has no rows that can be read"
        else:
            found.not_read[path] = "of no format that is read"


def _is_table(path: Path, format: Format) -> bool:
    """Whether a text file is a table, whose first lines name pictures, and not a text with a comma in each line."""
    if format.kind != "delimited":
        return True
    with path.open(encoding=format.encoding, errors="replace") as file:
        head = [line.rstrip("\r\n").split(format.delimiter) for line in islice(file, 2)]
    names = {cell.strip().strip('"').lower() for cell in head[0]}
    cells = [cell.strip().strip('"').partition("#")[0].lower() for line in head for cell in line]
    named = any(cell.endswith(tuple(IMAGE_SUFFIXES)) for cell in cells)
    return named or bool(names & {*IMAGES, *FILE_COLUMNS})
