"""Talk to the Hugging Face Hub: what a repository holds, and its files by byte ranges.

`HF_TOKEN` is the only credential that is looked at.
"""

import re
import time
from collections.abc import Sequence
from typing import Any

from mllm_assets.errors import SourceError
from mllm_assets.hub_errors import HubRepo, explained, hub_token
from mllm_assets.hub_patience import CutOff, patiently, within

REQUEST_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
REACH_TIMEOUT_S = 8.0  # the first contact, with its name look-up and retries, fails within this
FILES_A_REQUEST = 500


def is_commit(revision: str | None) -> bool:
    """Whether a revision can never stand for anything else."""
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def find_repo(hub: HubRepo, *, revision: str | None = None, sizes: bool = False) -> Any:
    """What the Hub says of a revision: `sha` is its commit, `siblings` its files.

    Args:
        hub: The repository.
        revision: Another revision than the declared one.
        sizes: Ask for each file's `size`, `blob_id` and `lfs` too.

    Raises:
        SourceError: Unreachable (within 10 s), unknown, gated or withdrawn; says what to do.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.endpoint, token=hub_token())
    deadline_s = time.monotonic() + REACH_TIMEOUT_S

    def ask() -> Any:
        left_s = max(deadline_s - time.monotonic(), 1.0)
        timeout_s = min(REQUEST_TIMEOUT_S, left_s)
        info = api.dataset_info if hub.kind == "dataset" else api.model_info
        options = {"revision": revision or hub.revision, "timeout": timeout_s, "files_metadata": sizes}
        return within(left_s, lambda: info(hub.repo, **options))

    return explained(hub, lambda: patiently(ask, deadline_s=deadline_s - REQUEST_TIMEOUT_S))


def require_access(hub: HubRepo) -> None:
    """Ask once whether the token may read the files of a repository; what is gated is described to everybody.

    Raises:
        SourceError: It may not, or the Hub does not answer within `REACH_TIMEOUT_S`; says what to do.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.endpoint, token=hub_token())
    explained(hub, lambda: within(REACH_TIMEOUT_S, lambda: api.auth_check(hub.repo, repo_type=hub.kind)))


def find_sizes(hub: HubRepo, commit: str, names: Sequence[str]) -> dict[str, int]:
    """The sizes of some files in bytes, in the order of their names.

    Raises:
        SourceError: The Hub does not give them.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.endpoint, token=hub_token())

    def ask(some: Sequence[str]) -> Any:
        paths = list(some)
        return within(READ_TIMEOUT_S, lambda: api.get_paths_info(hub.repo, paths, repo_type=hub.kind, revision=commit))

    parts = [names[start : start + FILES_A_REQUEST] for start in range(0, len(names), FILES_A_REQUEST)]
    found = [item for part in parts for item in explained(hub, lambda part=part: patiently(lambda: ask(part)))]
    sizes = {item.path: item.size for item in found}
    return {name: sizes[name] for name in names}


def read_range(hub: HubRepo, commit: str, name: str, start: int, stop: int) -> bytes:
    """The bytes `start` to `stop` (exclusive) of a file; what passes is tried again, for about a minute at most.

    Raises:
        SourceError: The Hub refuses or cannot be reached, or the range is not what came.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(hub.repo, name, repo_type=hub.kind, revision=commit, endpoint=hub.endpoint)
    # a compressed answer has other ranges: a CDN then sends the whole file
    wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    headers = {**build_hf_headers(token=hub_token()), **wanted}

    def fetch() -> bytes:
        with get_session().stream("GET", url, headers=headers, timeout=READ_TIMEOUT_S) as response:
            if response.status_code >= 400:
                response.read()
                hf_raise_for_status(response)
            # an answer that is not the range is not read: it may be the whole file
            if not _is_range(response, start, stop):
                raise SourceError(
                    f"{hub.repo}: the Hub answered {response.status_code} in place of bytes {start} to {stop} of "
                    f"{name}. Check HF_ENDPOINT and the proxy: one of them does not serve byte ranges."
                )
            data = response.read()
        if len(data) != stop - start:
            raise CutOff(f"{name} was cut off: {len(data)} of {stop - start} bytes came")
        return data

    return explained(hub, lambda: patiently(fetch))


def _is_range(response: Any, start: int, stop: int) -> bool:
    if response.status_code == 206:
        return response.headers.get("Content-Range", "").startswith(f"bytes {start}-{stop - 1}/")
    return response.status_code == 200 and start == 0 and response.headers.get("Content-Length") == str(stop)
