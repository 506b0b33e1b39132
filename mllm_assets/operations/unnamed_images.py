"""Images below `data/images/` that no dataset names any more."""

import hashlib
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from mllm_assets.data.dataset_info import load_entries
from mllm_assets.data.publish import IMAGE_LIST, NAMED_IMAGES, listed_images
from mllm_assets.data.sharegpt import load_rows
from mllm_assets.layout import Layout

BY_CONTENT = re.compile(r"([0-9a-f]{16})\.\w+")


def find_unnamed_images(layout: Layout, gone: Collection[Path]) -> Iterator[Path]:
    """Images that this project wrote and that nothing names but the dataset versions in `gone`.

    A picture that a person put there is never among them: ours are named by their content, or are in the list that a
    dataset with `output.image_prefix` keeps of its own.

    Raises:
        MllmAssetsError: An entry of `dataset_info.json` cannot be read, so that nobody knows what it names.
    """
    named: set[Path] = set()
    for version in layout.data.glob(".versions/*/*"):
        if version not in gone and (version / IMAGE_LIST).is_file():
            named.update((layout.data / name).resolve() for name, _ in listed_images(version))
    for name, entry in load_entries(layout.data).items() if layout.dataset_info.is_file() else ():
        if entry.remote is None and (layout.data / entry.file_name).exists():  # what is not there names nothing
            named.update(image.resolve() for row in load_rows(layout.data, name) for image in row.images)
    ours = {
        name
        for claims in layout.data.glob(f".versions/*/{NAMED_IMAGES}")
        for name in claims.read_text(encoding="utf-8").splitlines()
    }
    for path in sorted(layout.images.iterdir()) if layout.images.is_dir() else ():
        is_ours = f"images/{path.name}" in ours or BY_CONTENT.fullmatch(path.name) is not None
        if is_ours and path.is_file() and path.resolve() not in named:
            if f"images/{path.name}" in ours or _is_named_by_content(path):
                yield path


def _is_named_by_content(path: Path) -> bool:
    match = BY_CONTENT.fullmatch(path.name)
    if match is None:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(match[1])
