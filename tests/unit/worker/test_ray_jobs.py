"""What the launcher `ray` says where it cannot work, without ray."""

import sys

import pytest

from mllm_assets.errors import MachineError
from mllm_assets.worker.ray_jobs import connect


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.job_submission", None)
    with pytest.raises(MachineError) as error:
        connect("http://127.0.0.1:8265")
    assert str(error.value) == (
        "The launcher ray needs the extra ray, which is not installed: pip install -c constraints.txt -e '.[ray]'"
    )
