"""The worker's side of `benchmarks`: serve one model, let lmms-eval ask it, and keep what it was asked and said."""

import shutil
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from mllm_assets.artifacts import is_sound, read_manifest, staged_directory, write_json_atomic, write_manifest
from mllm_assets.errors import MachineError
from mllm_assets.evaluation.benchmarks import FIGURES, SAMPLES, to_table
from mllm_assets.evaluation.lmms_eval import LOG, Asking, run_lmms_eval
from mllm_assets.evaluation.lmms_results import read_results, require_answered, with_pictures
from mllm_assets.evaluation.predict import require_named_model
from mllm_assets.file_digests import FileDigests
from mllm_assets.inference.answerer import Answerer
from mllm_assets.redaction import redacted
from mllm_assets.training.models.device import pick_device
from mllm_assets.training.runs.models import NamedModel
from mllm_assets.worker.benchmark_task import BenchmarkTask
from mllm_assets.worker.tasks import Manifest

if TYPE_CHECKING:
    from mllm_assets.inference.recorded_server import RecordedServer
    from mllm_assets.worker.protocol import Reporter

EVERY_S = 5.0


def benchmark_task(task: BenchmarkTask, reporter: "Reporter") -> Manifest:
    """Worker entry: write samples, figures and lmms-eval's log.

    Raises:
        ModelError: The model cannot be loaded, or has another chat template than it was trained in.
        IntegrityError: It is not the one that the directory is named by.
        DataError: lmms-eval failed, or a question was not answered.
        MachineError: What serves a model is not installed.
    """
    if is_sound(task.directory):
        return read_manifest(task.directory)
    if missing := [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]:
        text = f"benchmarks need {', '.join(missing)}. Install what serves a model: pip install 'mllm-assets[serve]'"
        raise MachineError(text)

    from mllm_assets.inference.recorded_server import recorded_server

    started_s, digests = time.perf_counter(), FileDigests()
    require_named_model(task.model_dir, task.model_digest, digests)
    device = pick_device(task.accelerator.device, warn=reporter.warn)
    answerer = Answerer(task.model_dir, task.recipe.turns, device=device.kind, digests=digests)
    named = NamedModel(name=task.model, directory=task.model_dir, turns=task.recipe.turns)
    with staged_directory(task.directory) as staging:
        with recorded_server(named, answerer, max_new_tokens=task.settings.max_new_tokens) as server:
            asking = Asking(address=server.address, api_key=server.api_key, model=task.model)
            output = run_lmms_eval(
                task.python, task.settings, asking,
                root=task.root, folder=task.folder, into=staging, on_poll=_Progress(task.model, server, reporter),
            )  # fmt: skip
        results = read_results(output)
        require_answered(results.samples, server.exchanges)
        samples = with_pictures(results.samples, server.exchanges)
        shutil.rmtree(output)
        pq.write_table(to_table(samples), staging / SAMPLES)
        figures = {"figures": results.figures, "higher_is_better": results.higher_is_better}
        write_json_atomic(staging / FIGURES, figures)
        log = staging / LOG
        log.write_text(redacted(log.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")
        payload = {
            "model": task.model,
            "lineage": task.lineage,
            "num_samples": len(samples),
            "num_requests": len(server.exchanges),
            "knows_pictures": all(sample.pictures is not None for sample in samples),
            "wall_s": round(time.perf_counter() - started_s, 2),
        }
        digests.require_unchanged()
        return write_manifest(staging, payload)


class _Progress:
    """Says how many questions were answered, and before that, that lmms-eval starts."""

    def __init__(self, model: str, server: "RecordedServer", reporter: "Reporter") -> None:
        self._stage, self._server, self._reporter = f"benchmark {model} model", server, reporter
        self._started_s = self._told_s = time.monotonic()
        reporter.notify(f"lmms-eval asks the {model} model")

    def __call__(self, num_questions: int | None) -> None:
        now_s = time.monotonic()
        if num_questions is not None and self._server.num_answered:
            self._reporter.progress(self._stage, min(self._server.num_answered, num_questions), num_questions)
        elif now_s - self._told_s >= EVERY_S:
            self._told_s = now_s
            self._reporter.notify(f"{self._stage}: lmms-eval loads its tasks, for {now_s - self._started_s:.0f} s")
