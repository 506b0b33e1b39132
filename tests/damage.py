"""What happens to files: gone, cut to half, one bit flipped, a folder or link instead; or changed by a publisher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import DIGEST, read_manifest, write_manifest


def _cut(path: Path) -> None:
    _write(path, path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    _write(path, bytes(data))


def _write(path: Path, data: bytes) -> None:
    path.chmod(path.stat().st_mode | 0o200)  # a release is read-only
    path.write_bytes(data)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "a file").touch()


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _looped(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


DAMAGES: dict[str, Callable[[Path], None]] = {"gone": Path.unlink, "cut": _cut, "flipped": _flip}
OTHER_KINDS: dict[str, Callable[[Path], None]] = {"a folder": _folder, "dangling": _dangling, "looped": _looped}


def publish_changed(directory: Path, **changed: Any) -> None:
    """Write an artefact's manifest for its files as they are now, as if they had been published so."""
    manifest = {name: value for name, value in read_manifest(directory).items() if name not in ("files", DIGEST)}
    write_manifest(directory, manifest | changed)
