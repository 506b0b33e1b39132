"""Push a release to a model repository of the Hugging Face Hub, in one commit; dry by default.

Not pushed: the manifest, which describes this folder, and the predictions, which hold texts of the dataset.
`HF_TOKEN` is the only credential; no message and no result holds it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from mllm_assets.artifacts import MANIFEST, read_manifest
from mllm_assets.errors import GateError, RecipeError, SourceError
from mllm_assets.evaluation.table import PREDICTIONS_FILE
from mllm_assets.hub.errors import hub_token, scrubbed
from mllm_assets.layout import Layout
from mllm_assets.releases.versions import current_release, require_intact

NOT_PUSHED = {MANIFEST, PREDICTIONS_FILE}


class PublicRepo(SourceError):
    """A release that should be private would be public."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PushSpec:
    """Where a release goes.

    Attributes:
        repo_id: `owner/name` of a model repository; created if missing.
        private: Whether a repository that is created is visible to its owner only.
        revision: Branch, created if missing; None is the default branch.
        dry_run: Only say what would be pushed.

    Raises:
        RecipeError: `repo_id` is not a Hub id.
    """

    repo_id: str
    private: bool = True
    revision: str | None = None
    dry_run: bool = True

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", self.repo_id):
            raise RecipeError(f"push_to_hub.repo_id is {self.repo_id!r}: expected owner/name, for example me/my-model.")


def files_to_push(release_dir: Path) -> dict[str, int]:
    """The size in bytes of each file that goes to the Hub, by name."""
    files = read_manifest(release_dir)["files"]
    return {name: file["num_bytes"] for name, file in sorted(files.items()) if name not in NOT_PUSHED}


def require_current(layout: Layout, recipe_name: str, release_dir: Path) -> None:
    """Refuse to push what was rolled back.

    Raises:
        GateError: Another release is the current one.
    """
    current = current_release(layout, recipe_name)
    if current is None or current.directory != release_dir:
        now = current.version if current else "none"
        raise GateError(
            f"{release_dir.name} of {recipe_name} is not pushed: it is not the current release, which is {now}. Make "
            f"it current (mllm-assets releases rollback {recipe_name} {release_dir.name}), or release another model."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Pushed:
    """The commit of a release on the Hub."""

    repo_url: str
    commit: str
    commit_url: str


def push(release_dir: Path, spec: PushSpec) -> Pushed:
    """Push a release in one commit: whoever reads the repository sees all of it or nothing.

    Raises:
        IntegrityError: A file changed since the release.
        SourceError: There is no token, it may not write there, the repository is public where it must not be, or
            the Hub cannot be reached; says what to do.
    """
    require_intact(release_dir)
    token = hub_token()
    if not token:
        raise SourceError(
            f"Pushing to {spec.repo_id} needs a token. Set HF_TOKEN to one that may write there "
            "(https://huggingface.co/settings/tokens), or set push_to_hub.dry_run: true."
        )
    from huggingface_hub import CommitOperationAdd, HfApi, errors
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (its HTTP client's base)

    api = HfApi(token=token)
    manifest = read_manifest(release_dir)
    try:
        url = api.create_repo(spec.repo_id, private=spec.private, exist_ok=True)
        if spec.private and not api.model_info(spec.repo_id).private:
            raise PublicRepo(
                f"{spec.repo_id} is there already, and public, but push_to_hub.private is true. Set it to false to "
                "publish the model, or name another repository."
            )
        if spec.revision is not None:
            api.create_branch(spec.repo_id, branch=spec.revision, exist_ok=True)
        commit = api.create_commit(
            spec.repo_id,
            [CommitOperationAdd(name, release_dir / name) for name in files_to_push(release_dir)],
            commit_message=f"{manifest['recipe']} {manifest['version']}, weights {manifest['weights_digest'][:16]}",
            revision=spec.revision,
        )
    except (HTTPError, errors.OfflineModeIsEnabled, OSError, ValueError) as error:
        message = scrubbed(_explanation(spec, error))
    else:
        return Pushed(repo_url=str(url), commit=commit.oid, commit_url=str(commit.commit_url))
    raise SourceError(message)  # outside of the block: a chained error would carry the request into a traceback


def _explanation(spec: PushSpec, error: Exception) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    namespace = spec.repo_id.partition("/")[0]
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{spec.repo_id} cannot be pushed because HF_HUB_OFFLINE is set. Unset it where there is a network."
    if status == 401:
        return (
            f"The Hub does not accept HF_TOKEN for {spec.repo_id}: it is wrong, has expired or was revoked. Set "
            "HF_TOKEN to a valid token that may write there."
        )
    if status in (403, 404):
        return (
            f"HF_TOKEN may not write to {spec.repo_id} ({status}). Use a token with the role write, or a fine-grained "
            f"one with the right to write to repositories of {namespace}, or correct push_to_hub.repo_id."
        )
    cause = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"{spec.repo_id} could not be pushed ({cause}). Nothing was committed; check the network and HF_ENDPOINT, then "
        "materialise again: what was uploaded is not sent twice."
    )
