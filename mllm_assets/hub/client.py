"""The Hugging Face Hub's API: the files of a repository, read by byte ranges.

`HF_TOKEN` is the only credential that is used.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING, Any

from mllm_assets.errors import SourceError
from mllm_assets.hub.errors import CutOff, HubRepo, explained, hub_token, with_retries, with_timeout

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REQUEST_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
HEAD_TIMEOUT_S = 120.0  # until an answer of bytes begins, redirects included: each part of it may take READ_TIMEOUT_S
MIN_BYTES_PER_S = 1024  # of an answer that takes longer than READ_TIMEOUT_S; a slower one is given up
REACH_TIMEOUT_S = 8.0  # the first contact, with its name look-up and retries, fails within this
FILES_A_REQUEST = 500
MAX_ANSWER_BYTES = 64 * 2**20  # of any answer: a part of a file, or the list of some 100,000 files


@cache
def cap_answers() -> None:
    """Limit the bytes read of any answer of a Hub, whatever its headers say, and the seconds that they may take.

    Above the bytes `SourceError` is raised, after the seconds `CutOff`.
    """
    import httpx2
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    class Capped(httpx2.SyncByteStream):
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __iter__(self) -> Iterator[bytes]:
            num_bytes, started_s = 0, time.monotonic()
            for part in self._stream:
                num_bytes += len(part)
                time_s = time.monotonic() - started_s
                if time_s > READ_TIMEOUT_S and num_bytes < time_s * MIN_BYTES_PER_S:
                    raise CutOff(f"{num_bytes} bytes came in {time_s:.0f} s, too few to wait for the rest")
                if num_bytes > MAX_ANSWER_BYTES:
                    raise SourceError(
                        f"The Hub sent more than {MAX_ANSWER_BYTES // 2**20} MiB, more than was requested, so the "
                        "rest was not read. Check HF_ENDPOINT and the proxy."
                    )
                yield part

        def close(self) -> None:
            self._stream.close()

    def cap(response: Any) -> None:
        response.stream = Capped(response.stream)

    def make_client() -> Any:
        client = default_client_factory()
        client.event_hooks = {**client.event_hooks, "response": [*client.event_hooks["response"], cap]}
        client.headers["Accept-Encoding"] = "identity"  # a compressed answer may become a thousand times as large
        return client

    set_client_factory(make_client)


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit hash, which never moves."""
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def _api(hub: HubRepo) -> "HfApi":
    from huggingface_hub import HfApi

    cap_answers()
    return HfApi(endpoint=hub.endpoint, token=hub_token())


def find_repo(hub: HubRepo, *, revision: str | None = None, sizes: bool = False) -> Any:
    """The Hub's description of a revision, the declared one by default: `sha` is its commit, `siblings` its files.

    With `sizes` each file has its `size`, `blob_id` and `lfs`.

    Raises:
        SourceError: Unreachable (within 10 s), unknown, gated or withdrawn; says what to do.
    """
    api = _api(hub)
    deadline_s = time.monotonic() + REACH_TIMEOUT_S

    def ask() -> Any:
        left_s = max(deadline_s - time.monotonic(), 1.0)
        timeout_s = min(REQUEST_TIMEOUT_S, left_s)
        info = api.dataset_info if hub.kind == "dataset" else api.model_info
        options = {"revision": revision or hub.revision, "timeout": timeout_s, "files_metadata": sizes}
        return with_timeout(left_s, lambda: info(hub.repo, **options))

    return explained(hub, lambda: with_retries(ask, deadline_s=deadline_s - REQUEST_TIMEOUT_S))


def require_access(hub: HubRepo) -> None:
    """Check that the token may read a repository's files; even a gated one shows everybody its description.

    Raises:
        SourceError: It may not, or the Hub does not answer within `REACH_TIMEOUT_S`; says what to do.
    """
    api = _api(hub)
    explained(hub, lambda: with_timeout(REACH_TIMEOUT_S, lambda: api.auth_check(hub.repo, repo_type=hub.kind)))


def find_sizes(hub: HubRepo, commit: str, names: Sequence[str]) -> dict[str, int]:
    """The sizes of some files in bytes, in the order of their names.

    Raises:
        SourceError: The Hub does not give them.
    """
    api = _api(hub)

    def ask(some: Sequence[str]) -> Any:
        options = {"paths": list(some), "repo_type": hub.kind, "revision": commit}
        return with_timeout(READ_TIMEOUT_S, lambda: api.get_paths_info(hub.repo, **options))

    parts = [names[start : start + FILES_A_REQUEST] for start in range(0, len(names), FILES_A_REQUEST)]
    found = [item for part in parts for item in explained(hub, lambda part=part: with_retries(lambda: ask(part)))]
    sizes = {item.path: item.size for item in found}
    return {name: sizes[name] for name in names}


def read_range(hub: HubRepo, commit: str, name: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` (exclusive) of a file; transient errors are retried, for about a minute at most.

    Raises:
        SourceError: The Hub refuses or cannot be reached, or sends another range.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(hub.repo, name, repo_type=hub.kind, revision=commit, endpoint=hub.endpoint)
    # a compressed answer has other ranges: a CDN then sends the complete file
    wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    headers = {**build_hf_headers(token=hub_token()), **wanted}

    cap_answers()

    def fetch() -> bytes:
        with ExitStack() as opened:
            answer = get_session().stream("GET", url, headers=headers, timeout=READ_TIMEOUT_S)
            response = with_timeout(HEAD_TIMEOUT_S, lambda: opened.enter_context(answer))
            if response.status_code >= 400:
                response.read()
                hf_raise_for_status(response)
            # an answer that is not the range is not read: it may be the complete file
            if not _is_range(response, start, stop):
                raise SourceError(
                    f"{hub.repo}: the Hub answered {response.status_code} instead of bytes {start} to {stop} of "
                    f"{name}. Check HF_ENDPOINT and the proxy: one of them does not serve byte ranges."
                )
            data = bytearray()
            for part in response.iter_raw():
                data += part
                if len(data) > stop - start:
                    raise SourceError(
                        f"{hub.repo}: the Hub sent more than the {stop - start} bytes of {name} that were requested: "
                        "nothing of it is used. Check HF_ENDPOINT and the proxy."
                    )
        if len(data) != stop - start:
            raise CutOff(f"{name} was cut off: {len(data)} of {stop - start} bytes came")
        return bytes(data)

    return explained(hub, lambda: with_retries(fetch))


def _is_range(response: Any, start: int, stop: int) -> bool:
    if response.status_code == 206:
        return response.headers.get("Content-Range", "").startswith(f"bytes {start}-{stop - 1}/")
    return response.status_code == 200 and start == 0 and response.headers.get("Content-Length") == str(stop)
