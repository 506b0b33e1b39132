"""Which folders a recipe's runs may be in."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

NOT_FOR_RUNS = ("data", "pretrains", "releases", "cache", "configs")  # folders of the project with other contents
_OF_RUNS = re.compile(r"latest|predictions|eval_metrics|[0-9a-f]{16}(-\d+)?")  # what a folder of runs holds
MAX_NAME_BYTES = 200  # of the file system's 255: a run's directory, its lock and leftovers have longer names


def output_dir_problems(name: str) -> Iterator[tuple[str, str]]:
    """A run writes, renames and deletes in its `output_dir`, so it must be a folder of runs alone."""
    parts = PurePosixPath(name).parts
    example = "Name a folder of its own, for example output_dir: outputs/my_recipe."
    first = parts[0].casefold() if parts else ""  # as disks that know no capitals have it
    if any(not character.isprintable() for character in name):
        yield "output_dir", f"output_dir {name[:40]!r} has a character that is not printable. {example}"
    elif any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        yield "output_dir", f"output_dir has a name of more than {MAX_NAME_BYTES} bytes. {example}"
    elif any(part != part.strip() for part in parts):
        yield "output_dir", f"output_dir is {name!r}, with a space where a name begins or ends. {example}"
    elif not parts or (first == "outputs" and len(parts) == 1):
        yield "output_dir", f"output_dir is {name!r}, which holds more than the runs of one recipe. {example}"
    elif set(parts) <= {"/", "//"} or parts[0].startswith("~") or any(part.startswith(".") for part in parts):
        yield "output_dir", f"output_dir is {name!r}, which is a root, a home or a hidden folder. {example}"
    elif first in NOT_FOR_RUNS:
        yield "output_dir", f"output_dir is {name!r}, and {parts[0]}/ has other contents than runs. {example}"
    elif first == "outputs" and (taken := list(filter(_OF_RUNS.fullmatch, parts[2:]))):
        yield "output_dir", f"output_dir is {name!r}, and {taken[0]}/ is of another recipe's runs. {example}"
