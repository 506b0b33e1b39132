"""What a model was trained on before it came here: the runs of its line, each with its training entries."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import is_complete, read_manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One training run of a line.

    Attributes:
        recipe: The recipe's slug.
        fingerprint: The run's name.
        data_dir: The folder of the `dataset_info.json` that it read.
        entries: `entry_digest` of each training entry at that time, by name.
    """

    recipe: str
    fingerprint: str
    data_dir: Path
    entries: Mapping[str, str]

    @property
    def title(self) -> str:
        """What people are told."""
        return f"the earlier stage {self.recipe} (run {self.fingerprint})"

    def to_dict(self, root: Path) -> dict[str, Any]:
        """JSON-able values; the path is relative to the project, which may move."""
        return {
            "recipe": self.recipe,
            "fingerprint": self.fingerprint,
            "dataset_dir": os.path.relpath(self.data_dir, root),
            "entries": dict(self.entries),
        }


def stages_of(manifest: Mapping[str, Any], root: Path) -> list[Stage]:
    """The stages of a finished run's or a release's model, the first one first, its own last."""
    return [
        Stage(
            recipe=stage["recipe"],
            fingerprint=stage["fingerprint"],
            data_dir=root / stage["dataset_dir"],
            entries=stage["entries"],
        )
        for stage in manifest.get("stages", [])
    ]


def stages_behind(model_dir: Path, root: Path) -> list[Stage]:
    """The stages that a model directory went through; none of a pretrained model, or of one that was copied alone."""
    for owner in (model_dir.resolve(), model_dir.resolve().parent):
        if is_complete(owner) and (stages := stages_of(read_manifest(owner), root)):
            return stages
    return []
