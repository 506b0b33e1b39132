"""Train over several machines: `python -m mllm_assets.training.loop.ray_train TASK.json RESULT.json CPUS GPUS GRACE_S`.

A driver on the cluster, which starts one Ray Train worker for each rank. Such a worker is to its rank what torchrun's
agent is: it holds the store in which the ranks find each other, and runs the same worker process under the same
supervisor, so that whichever of them dies, nothing trains on. Only the ranks load the model and exchange gradients.
"""

import json
import math
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import write_json_atomic
from mllm_assets.redaction import redacted, redacted_output
from mllm_assets.worker import supervisor
from mllm_assets.worker.protocol import EXIT_OK, EXIT_USER_ERROR, LOST_PEER
from mllm_assets.worker.tasks import from_json

LOOK_EVERY_S, NOTICE_S = 0.5, 20.0
EXIT_CRASHED = 1
# Ray sets it for a trainer in its own process; a rank chooses its device as under torchrun
OF_THE_AGENT = "ACCELERATE_TORCH_DEVICE"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """What a Ray Train worker needs to start its rank; the folder is that of the job, which all machines see."""

    folder: Path
    grace_s: float

    def run(self) -> None:
        """Run the rank of this Ray worker until it ends.

        Raises:
            RuntimeError: It failed. What it found is in the result's file.
        """
        store = _shared_store()
        rank = os.environ["RANK"]
        command = [sys.executable, supervisor.__file__, f"{self.grace_s:g}", "-", sys.executable, "-m"]
        command += ["mllm_assets.worker", str(self.folder / "task.json"), str(self.folder / "result.json")]
        with (self.folder / f"rank-{rank}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=self._environment(), start_new_session=True
            )
            try:
                code = process.wait()  # a Ray worker that is killed closes the supervisor's stdin
            finally:
                assert process.stdin is not None
                process.stdin.close()
        if code != EXIT_OK:
            raise RuntimeError(f"rank {rank} ended with exit code {code}")
        _wait_for_all(store)

    def _environment(self) -> dict[str, str]:
        variables = {name: value for name, value in os.environ.items() if name != OF_THE_AGENT}
        return {**variables, "TORCHELASTIC_USE_AGENT_STORE": str(True), supervisor.MARK: uuid.uuid4().hex}


def _shared_store() -> Any:
    """A store on the first rank's machine, in which ranks find each other; `MASTER_PORT` is its port from now on.

    That of Ray's own process group has the agents' addresses under the names that the ranks would use.
    """
    from torch import distributed
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    port, store = [0], None
    if distributed.get_rank() == 0:
        store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        port = [store.port]
    distributed.broadcast_object_list(port)
    os.environ["MASTER_PORT"] = str(port[0])
    return store


def _wait_for_all(store: Any) -> None:
    """Keep the store until the last rank has ended."""
    from torch import distributed

    distributed.barrier()
    del store


def run_rank(config: dict[str, Rank]) -> None:
    """What each Ray Train worker does."""
    config["rank"].run()


def train(folder: Path, num_workers: int, num_cpus: float, num_gpus: float, grace_s: float) -> int:
    """Run the task in a job's folder with one rank in each of several Ray workers. Returns the exit code."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(address="auto", log_to_driver=False)
    trainer = TorchTrainer(
        run_rank,
        train_loop_config={"rank": Rank(folder=folder, grace_s=grace_s)},
        torch_config=TorchConfig(backend="gloo"),  # of the agents; ranks choose a backend of their own
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=num_gpus > 0,
            resources_per_worker={"CPU": num_cpus, **({"GPU": num_gpus} if num_gpus else {})},
            placement_strategy="SPREAD",
        ),
        run_config=RunConfig(name="ray", storage_path=str(folder), failure_config=FailureConfig(max_failures=0)),
    )
    try:
        with _watched(folder):
            trainer.fit()
        return EXIT_OK
    except TrainingFailedError as error:
        print(redacted(str(error)), file=sys.stderr)
        return _code_of_failure(folder)


def _code_of_failure(folder: Path) -> int:
    """The exit code after a failure; where no rank could say what happened, it was lost."""
    outcome = _outcome(folder)
    if not outcome:
        write_json_atomic(folder / "result.json", {"lost": LOST_PEER})
    return EXIT_USER_ERROR if "error" in outcome else EXIT_CRASHED


def _outcome(folder: Path) -> dict[str, Any]:
    """What a rank wrote."""
    path = folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@contextmanager
def _watched(folder: Path) -> Iterator[None]:
    """Print what the ranks write, as it is: messages to Dagster are lines of it, which Ray's own log would begin.

    Where a rank failed and Ray has not noticed after `NOTICE_S`, as of a machine that is gone, this process ends: with
    it Ray ends what is left of the job.
    """
    ended = threading.Event()
    logs = _Logs(folder)

    def watch() -> None:
        failed_at_s = math.inf
        while not ended.wait(LOOK_EVERY_S):
            logs.copy()
            if _outcome(folder) and "result" not in _outcome(folder):
                failed_at_s = min(failed_at_s, time.monotonic())
            if time.monotonic() - failed_at_s > NOTICE_S:
                os._exit(_code_of_failure(folder))

    thread = threading.Thread(target=watch, name="ranks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        logs.copy()


class _Logs:
    """The files into which the ranks of a job write; whole lines of them go to standard output, once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}

    def copy(self) -> None:
        for path in sorted(self._folder.glob("rank-*.log")):
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                lines, newline, _ = file.read().rpartition(b"\n")
            self._offsets[path] = self._offsets.get(path, 0) + len(lines + newline)
            sys.stdout.write((lines + newline).decode(errors="replace"))
        sys.stdout.flush()


def main() -> None:
    """Entry point of the driver."""
    supervisor.die_with_parent()
    task_path, num_cpus, num_gpus, grace_s = sys.argv[1], *map(float, sys.argv[2:])
    folder = Path(task_path).parent
    task = from_json(json.loads(Path(task_path).read_text(encoding="utf-8")))
    with redacted_output():
        code = train(folder, task.accelerator.num_processes, num_cpus, num_gpus, grace_s)
    sys.exit(code)


if __name__ == "__main__":
    main()
