"""Errors for people: each class says who should act; each message says what is wrong, where, and one next step."""

from mllm_assets.redaction import redacted


class MllmAssetsError(Exception):
    """Something a person can mend. Shown without a traceback; never retried. Its text holds no secret."""

    def __str__(self) -> str:
        return redacted(super().__str__())


class RecipeError(MllmAssetsError):
    """The recipe or component YAML must change."""


class DataError(MllmAssetsError):
    """A dataset's files must change."""


class SourceError(MllmAssetsError):
    """A hub, network or credential must change."""


class ModelError(MllmAssetsError):
    """A model directory must change."""


class MachineError(MllmAssetsError):
    """The machine must change: device, memory or disk."""


class IntegrityError(MllmAssetsError):
    """Something this project wrote is missing or damaged and must be made again."""


class GateError(MllmAssetsError):
    """The model must get better, or its gates change, before it is released."""
