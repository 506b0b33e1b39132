"""The Hub's token, and whether it opens the models that the project declares."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mllm_assets.errors import SourceError
from mllm_assets.hub import require_access
from mllm_assets.hub_errors import hub_token
from mllm_assets.operations.findings import Finding
from mllm_assets.training.pretrained import model_repo


@dataclass(frozen=True, kw_only=True, slots=True)
class HubModel:
    """A declared model of the Hub; `directory` is where it goes."""

    repo: str
    revision: str | None
    directory: Path


def check_hub(models: Iterable[HubModel], *, endpoint: str | None = None) -> list[Finding]:
    """A finding for the token, and one for each model that is not here yet. The token itself is never shown."""
    try:
        token = hub_token()
    except SourceError as error:
        what, step = str(error).split(". ", 1)
        return [Finding("HF_TOKEN", "fail", f"{what}.", step)]
    missing = [model for model in models if not (model.directory / "config.json").is_file()]
    detail = "is set" if token else "is not set; only gated and private repositories need it"
    return [Finding("HF_TOKEN", "ok", detail), *(_check_model(model, endpoint) for model in missing)]


def _check_model(model: HubModel, endpoint: str | None) -> Finding:
    from huggingface_hub.constants import is_offline_mode

    check = f"Hub: {model.repo}"
    if is_offline_mode():
        return Finding(check, "ok", "not asked: HF_HUB_OFFLINE is set")
    try:
        require_access(model_repo(model.repo, model.revision, model.directory, endpoint=endpoint))
    except SourceError as error:
        return Finding.of_error(check, "warn", error)
    return Finding(check, "ok", "may be read; it is fetched when a recipe needs it")
