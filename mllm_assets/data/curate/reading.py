"""How a folder is read, as `layouts` finds it out: the `source` of a dataset's YAML, prompts, answer, and its files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_assets.data.curate.columns import Chosen, Roles
from mllm_assets.data.curate.inventory import Inventory

OWN_QUESTION = ("{question}",)  # the prompt that a source with a question column has anyway


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a person chose where several readings fit.

    Attributes:
        chosen: Columns.
        file: The file of rows.
        entry: The entry of a LLaMA-Factory directory.
        media_dir: Folders that the images' paths are relative to.
        several: What becomes of several captions in a row.
    """

    chosen: Chosen = field(default_factory=Chosen)
    file: str | None = None
    entry: str | None = None
    media_dir: tuple[Path, ...] = ()
    several: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How a folder is read.

    Attributes:
        layout: What it is, in words.
        source: The `source` of a dataset's YAML.
        prompts: Questions, none for conversations.
        answer: The template of the answer.
        columns: What each column is for, in words.
        annotations: The files that hold its rows or texts.
        not_read: Other files, with the reason.
    """

    layout: str
    source: dict[str, Any]
    prompts: tuple[str, ...] = ()
    answer: str = ""
    columns: str = ""
    annotations: tuple[Path, ...] = ()
    not_read: Mapping[Path, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """A folder to be read: its files, what paths in a YAML are relative to, and what a person chose."""

    found: Inventory
    root: Path
    options: Options

    @property
    def path(self) -> Path:
        return self.found.folder

    def shown(self, path: Path) -> str:
        """A path as a YAML has it."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def shown_all(self, paths: Sequence[Path]) -> str | list[str]:
        names = [self.shown(path) for path in paths]
        return names[0] if len(names) == 1 else names

    def few(self, paths: Sequence[Path]) -> str:
        """The first of some paths, in words."""
        names = [path.relative_to(self.path).as_posix() for path in paths]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def media(self, dirs: Sequence[Path]) -> dict[str, Any]:
        """The `media_dir` of a YAML, where images are not beside the files that name them."""
        return {"media_dir": self.shown_all(dirs)} if dirs else {}

    def reading(
        self,
        layout: str,
        source: dict[str, Any],
        roles: Roles,
        files: Sequence[Path],
        not_read: Mapping[Path, str] | None = None,
    ) -> Reading:
        return Reading(
            layout=layout,
            source={**source, **roles.source()},
            prompts=() if roles.prompts == OWN_QUESTION else roles.prompts,
            answer=roles.answer,
            columns=roles.shown(),
            annotations=tuple(files),
            not_read=not_read or {},
        )
