"""What an evaluation that was interrupted has already asked: a line a batch, in a folder beside the one that it makes.

The folder is named by all that an answer depends on, so nothing of another model, version or device is taken for it.
Its name is that of unfinished work, which `mllm-assets gc` deletes when nobody comes back.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_assets.artifacts import digest_json
from mllm_assets.disk import full_disk_is_an_error
from mllm_assets.worker.tasks import EvaluateTask, Part

if TYPE_CHECKING:
    from mllm_assets.training.models.device import Device

Values = dict[str, dict[int, tuple[Any, ...]]]  # by the pass, then by the row's position
DIGEST = "digest"  # of the line without it


def folder_of(task: EvaluateTask, device: "Device") -> Path:
    """Where the answers are kept until the predictions are complete."""
    made_by = {
        "models": task.model_digests,
        "data": task.data_digests,
        "settings": asdict(task.settings),
        "device": [device.kind, device.name],
        "versions": [version(name) for name in ("torch", "transformers")],
    }
    return task.directory.with_name(f".{task.directory.name}.{digest_json(made_by)[:8]}.tmp")


def forget(directory: Path) -> None:
    """Delete what was kept for predictions that are complete."""
    for folder in directory.parent.glob(f".{directory.name}.????????.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


class AnsweredRows:
    """The rows that one model was asked about, of which each batch is kept as soon as it is there.

    Attributes:
        known: What an earlier start has of these rows; a line that is damaged or cut off counts as never written.
    """

    def __init__(self, folder: Path, model: str, part: Part, num_rows: Mapping[str, int]) -> None:
        """Read what is there.

        Args:
            folder: That of the predictions, see `folder_of`.
            model: Which one is asked.
            part: Which rows this process asks about.
            num_rows: Of each pass.
        """
        self._folder, self._model = folder, model
        self._path = folder / f"{model}-{part.index}-of-{part.count}.jsonl"
        self.known: Values = {name: {} for name in num_rows}
        for path in sorted(folder.glob(f"{model}-*-of-*.jsonl")):  # another number of parts may have begun it
            with path.open("rb") as file:
                for line in file:
                    name, rows = _read(line)
                    if name in self.known:
                        self.known[name] |= {at: values for at, values in rows.items() if at < num_rows[name]}

    def add(self, name: str, positions: Sequence[int], values: Sequence[tuple[Any, ...]]) -> None:
        """Keep a batch of the pass `name`.

        Raises:
            MachineError: The disk is full.
        """
        content = {"pass": name, "rows": [[at, list(value)] for at, value in zip(positions, values, strict=True)]}
        line = json.dumps({**content, DIGEST: digest_json(content)})
        with full_disk_is_an_error(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="ascii") as file:
                file.write(f"\n{line}")  # what comes before may be cut off


def _read(line: bytes) -> tuple[str, dict[int, tuple[Any, ...]]]:
    try:
        content = json.loads(line)
        if content.pop(DIGEST) != digest_json(content):
            return "", {}
        return content["pass"], {at: tuple(value) for at, value in content["rows"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", {}
