"""A database whose bytes changed: what shows it, and the copy of the last write, which takes its place."""

import logging
import shutil
from pathlib import Path

import duckdb

from mllm_assets.artifacts import sha256_file
from mllm_assets.errors import IntegrityError

_SIGNS = ("Corrupt", "checksum", "read enough bytes", "not a valid DuckDB", "version number")
log = logging.getLogger(__name__)


class DamagedDatabase(IntegrityError):
    """A database cannot be read."""


def may_be_damage(error: duckdb.Error) -> bool:
    """Whether an error is one that DuckDB raises for a damaged file."""
    is_internal = isinstance(error, duckdb.SerializationException | duckdb.InternalException)
    return is_internal or any(sign in str(error) for sign in _SIGNS)


def find_database_damage(path: Path) -> str | None:
    """Read every row of a closed database, since each block has a checksum; say what is wrong, or None."""
    if not path.is_file():
        return "it is missing"
    try:
        with duckdb.connect(str(path), read_only=True) as connection:
            for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall():
                connection.execute(f'SELECT sum(hash(rows)) FROM "{name}" rows').fetchall()
    except duckdb.Error as error:
        return str(error).splitlines()[0] if may_be_damage(error) else None
    return None


def restore_if_damaged(path: Path, snapshot: Path) -> None:
    """Compare a database with the copy of its last write; where they differ and it is damaged, restore the copy.

    To be called under the file's lock, while it is closed.

    Raises:
        IntegrityError: The copy is damaged too.
    """
    if not snapshot.is_file() and not path.is_file():
        return
    if snapshot.is_file() and path.is_file() and sha256_file(path) == sha256_file(snapshot):
        return
    damage = find_database_damage(path)  # else another program wrote into it, or a kill came before the copy
    if damage is not None:
        restore(path, snapshot, damage)


def restore(path: Path, snapshot: Path, damage: str) -> None:
    """Put a copy of the last write in the place of a damaged database, which is kept; raises as above."""
    if find_database_damage(snapshot) is not None:
        raise unreadable(path, damage)
    for broken in (path, path.with_name(f"{path.name}.wal")):
        if broken.exists():
            keep_damaged(broken)
    temporary = snapshot.with_suffix(".tmp")
    shutil.copyfile(snapshot, temporary)
    temporary.replace(path)
    text = f"{path} was damaged ({damage}) and is restored from the copy that the last write left, {snapshot.name}."
    log.warning(text)


def keep_damaged(path: Path) -> Path:
    """Rename a file that cannot be made again wholly; `mllm-assets gc` leaves it alone."""
    number = 1
    while (kept := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return path.rename(kept)


def unreadable(path: Path, why: object) -> DamagedDatabase:
    """The error for a database that cannot be read, nor restored."""
    return DamagedDatabase(
        f"{path} cannot be read as a DuckDB database ({str(why).splitlines()[0]}), and the copy of its last write is "
        "missing or damaged too. Run mllm-assets doctor --repair, which moves both away, and materialise the "
        "sample_quality assets again."
    )
