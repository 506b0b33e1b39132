"""Where a run may keep what its frozen parts compute. The launcher writes this into the worker's request."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_MAX_HIDDEN_STATES_GIB = 16.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSettings:
    """What a run may cache; a root that is None turns that cache off.

    Attributes:
        features_dir: The features that an upstream step computed. Nothing is added to them: an image that is not there
            means that the data changed.
        features_root: Where features may be computed, where no step did it before.
        hidden_states_root: Where hidden states may be computed.
        max_hidden_states_gib: Most that one run's hidden states may take on disk.
    """

    features_dir: Path | None = None
    features_root: Path | None = None
    hidden_states_root: Path | None = None
    max_hidden_states_gib: float = DEFAULT_MAX_HIDDEN_STATES_GIB

    def to_request(self) -> dict[str, Any]:
        """JSON-able values; `parse` reads them back."""
        paths = {name: getattr(self, name) for name in ("features_dir", "features_root", "hidden_states_root")}
        shown = {name: None if path is None else str(path) for name, path in paths.items()}
        return {**shown, "max_hidden_states_gib": self.max_hidden_states_gib}

    @classmethod
    def parse(cls, request: Mapping[str, Any]) -> "CacheSettings":
        paths = {
            name: Path(request[name]) if request.get(name) else None
            for name in ("features_dir", "features_root", "hidden_states_root")
        }
        limit = request.get("max_hidden_states_gib")
        return cls(**paths, max_hidden_states_gib=DEFAULT_MAX_HIDDEN_STATES_GIB if limit is None else float(limit))
