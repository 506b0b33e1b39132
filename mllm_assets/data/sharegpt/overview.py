"""What stays of an entry's rows once they were read: how many there are, which pictures they name, how answers begin.

It is kept below `cache/rows` by what the rows were read from, so that a file of a million rows is parsed once, and not
by everybody who asks for the digest of an entry.
"""

import json
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm_assets.artifacts import digest_json, is_sound, read_manifest, staged_directory, write_manifest
from mllm_assets.data.sharegpt.rows import Row

READER_VERSION = 2  # rises where other rows or pictures are found in the same file
IMAGES_FILE = "images.json"
VIDEOS_FILE = "videos.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """What is known of an entry's rows.

    Attributes:
        num_rows: How many there are.
        images: The different ones, sorted.
        videos: The different ones, sorted.
        num_alike: How many rows, from the first on, have the first one's last answer.
        order: If asked for, the place of each image as it comes.
    """

    num_rows: int
    images: list[Path]
    num_alike: int
    order: Sequence[int] = ()
    videos: Sequence[Path] = ()

    @classmethod
    def of(cls, rows: Iterable[Row], *, in_order: bool = False) -> "Overview":
        """Go through all rows."""
        first: dict[Path, int] = {}
        videos: set[Path] = set()
        order, num_rows, num_alike, answer = array("q"), 0, 0, ""
        for row in rows:
            answer = answer if num_rows else row.messages[-1].content
            num_alike += num_alike == num_rows and row.messages[-1].content == answer
            num_rows += 1
            videos.update(row.videos)
            for path in row.images:
                number = first.setdefault(path, len(first))
                if in_order:
                    order.append(number)
        images = sorted(first)
        place = {first[path]: at for at, path in enumerate(images)}
        order = array("q", map(place.__getitem__, order))
        return cls(num_rows=num_rows, images=images, num_alike=num_alike, order=order, videos=sorted(videos))


def kept_overview(
    root: Path,
    source: Sequence[object],
    folder: Path,
    rows: Callable[[], Iterable[Row]],
    *,
    is_lasting: Callable[[], bool] = lambda: True,
) -> Overview:
    """The overview of rows that were read from `source`, their pictures below or beside `folder`; raises as `rows`.

    Rows are read again where a picture is gone: that names the row, or finds another spelling. Nothing is kept unless
    `is_lasting` then: what a link means may change while the file of rows does not.
    """
    directory = root / digest_json(["overview", READER_VERSION, *source])[:16]
    if is_sound(directory) and (known := read_manifest(directory)).get("of") == directory.name:
        images, videos = (
            [Path(os.path.normpath(folder / name)) for name in json.loads((directory / file).read_bytes())]
            for file in (IMAGES_FILE, VIDEOS_FILE)
        )
        if all(path.is_file() for path in (*images, *videos)):
            os.utime(directory)  # when it was used last, for `mllm-assets gc`
            return Overview(num_rows=known["num_rows"], images=images, num_alike=known["num_alike"], videos=videos)
    found = Overview.of(rows())
    if not is_lasting():
        return found
    with staged_directory(directory) as staging:
        for file, paths in ((IMAGES_FILE, found.images), (VIDEOS_FILE, found.videos)):
            (staging / file).write_text(json.dumps([os.path.relpath(path, folder) for path in paths]))
        counts = {"num_rows": found.num_rows, "num_alike": found.num_alike}
        write_manifest(staging, {"of": directory.name, **counts})
    return found
