"""`mllm-assets check-server` against transformers' own server, with a faithful copy of a model and with spoilt ones."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mllm_assets.cli import main
from mllm_assets.errors import MachineError
from mllm_assets.evaluation.predict import evaluate_task
from mllm_assets.evaluation.table import SCHEMA, read_predictions
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import EvaluateTask
from tests.integration.conftest import wait_for
from tests.ports import free_port
from tests.worker_tasks import evaluation

pytest.importorskip("openai", reason="the extra serve is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that loads the model that a request names."""
    port, folder = free_port(), tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    log = folder / "log"
    with log.open("w") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as process:
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                return httpx.get(f"{url}/health").is_success
            except httpx.HTTPError:
                return False

        try:
            wait_for(answers, "the server answers")
            yield f"{url}/v1"
        finally:
            process.kill()


@pytest.fixture
def root(parity_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(parity_dir / "data", tmp_path / "data")
    shutil.copytree(parity_dir / "model", tmp_path / "pretrains" / "model")
    monkeypatch.setenv("MLLM_ASSETS_ROOT", str(tmp_path))
    return tmp_path


def changed(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def no_change(copy: Path) -> None:
    pass


def another_turn_format(copy: Path) -> None:
    template = copy / "chat_template.jinja"
    text = template.read_text()
    assert "<start_of_turn>model" in text
    template.write_text(text.replace("<start_of_turn>model", "<start_of_turn>assistant"))


def a_system_text(copy: Path) -> None:
    template = copy / "chat_template.jinja"
    text = template.read_text()
    assert 'first_user_prefix = ""' in text
    template.write_text(text.replace('first_user_prefix = ""', 'first_user_prefix = "Answer in French. "'))


def another_mean(copy: Path) -> None:
    changed(
        copy / "processor_config.json",
        lambda values: values | {"image_processor": values["image_processor"] | {"image_mean": [0.0, 0.1, 0.9]}},
    )


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (no_change, ""),
        (another_turn_format, "compare its chat template, system text and image settings"),
        (a_system_text, "compare its chat template, system text and image settings"),
        (another_mean, "compare weights, image mean and precision"),
    ],
)
def test_a_served_copy_answers_like_the_model_or_what_differs_is_said(
    plant: Callable[[Path], None], said: str, address: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = root / plant.__name__
    shutil.copytree(root / "pretrains" / "model", copy)
    plant(copy)
    options = ["--served-name", str(copy), "--max-samples", "6", "--max-new-tokens", "8", "--device", "cpu"]
    code = main(["check-server", address, "--model", "pretrained/model", "--on", "gemma3_vlm_val", *options])
    out = capsys.readouterr()
    assert code == (1 if said else 0), out
    assert (said or "equal answers                6 of 6") in out.out


def asked_of(url: str, root: Path, model: str, served: str) -> EvaluateTask:
    return evaluation(
        model_dir=root / "pretrains" / model, data_dir=root / "data", directory=root / f"predictions_{served}",
        max_new_tokens=8, max_samples=6,
        **({"backend": url, "backend_model": str(root / "pretrains" / served)} if served else {}),
    )  # fmt: skip


def test_predictions_are_answered_by_a_server_that_has_the_model(address: str, root: Path) -> None:
    """The losses are the model's, and the table is that of the model's own answers."""
    evaluate_task(asked_of(address, root, "model", ""), Reporter())
    task = asked_of(address, root, "model", "model")
    found = evaluate_task(task, Reporter())
    assert found.manifest["answered_by"]["tuned"].endswith("100% of 6 answers were the model's own")
    other = [name for name in SCHEMA.names if name != "latency_s" and name != "num_answer_tokens"]
    own = read_predictions(root / "predictions_").select(other)
    assert read_predictions(task.directory).select(other).equals(own)


def test_predictions_are_not_asked_of_a_server_with_another_model(address: str, root: Path) -> None:
    shutil.copytree(root / "pretrains" / "model", root / "pretrains" / "copy")
    another_turn_format(root / "pretrains" / "copy")
    with pytest.raises(MachineError, match=r"(?s)so it is not asked.*compare its chat template.*Serve that model"):
        evaluate_task(asked_of(address, root, "model", "copy"), Reporter())
    assert not (root / "predictions_copy").exists()


def test_a_server_that_is_not_there_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    assert main(["check-server", url, "--model", "pretrained/model", "--on", "gemma3_vlm_val", "--device", "cpu"]) == 2
    assert "does not answer as an OpenAI-compatible server does" in (told := capsys.readouterr().err) and url in told


def test_an_entry_without_rows_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ended in a division by zero."""
    info = root / "data" / "dataset_info.json"
    changed(info, lambda values: values | {"none": values["gemma3_vlm_val"] | {"file_name": "none.json"}})
    (root / "data" / "none.json").write_text("[]")
    url = f"http://127.0.0.1:{free_port()}/v1"
    assert main(["check-server", url, "--model", "pretrained/model", "--on", "none", "--device", "cpu"]) == 2
    assert "none" in (told := capsys.readouterr().err) and "Traceback" not in told
    assert main(["evaluate", "pretrained/model", "--on", "none", "--device", "cpu"]) == 2
    assert "Traceback" not in capsys.readouterr().err
