"""Makes a release's copy in GGUF by llama.cpp's converter, in the worker, and compares it with the release."""

import importlib.util
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_assets.artifacts import is_sound, read_manifest, staged_directory
from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.errors import IntegrityError, MachineError, ModelError
from mllm_assets.evaluation.agreement import Comparison, Told
from mllm_assets.evaluation.llama_cpp import LlamaCpp, without_pictures
from mllm_assets.evaluation.same_answers import Loaded, compare, some_rows
from mllm_assets.inference.answerer import Answerer
from mllm_assets.progress import doing, progress_to
from mllm_assets.releases.copies import GgufTask, write_copy
from mllm_assets.worker.tasks import Manifest

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

TEXT, PROJECTOR = "model.gguf", "mmproj.gguf"
INSTALL = "pip install 'mllm-assets[gguf]'"
TEXTS = {
    "library": "llama.cpp",
    "what": "GGUF",
    "how": f"""
Made by llama.cpp's `convert_hf_to_gguf.py`, with and without `--mmproj`:
`llama-server -m {TEXT} --mmproj {PROJECTOR}` serves it; Ollama and LM Studio take both files too.""",
}


def gguf_task(task: GgufTask, reporter: "Reporter") -> Manifest:
    """Worker entry: write both files with a card; what they answer is compared where `xllamacpp` is installed.

    Raises:
        ModelError: The converter does not know the model.
        MachineError: It lacks a package.
        IntegrityError: What it wrote is no GGUF.
        DataError: A row cannot be asked.
    """
    if is_sound(task.directory):
        return read_manifest(task.directory)
    with progress_to(reporter.notify), staged_directory(task.directory) as staging:
        counts = {}
        for name, options in ((TEXT, []), (PROJECTOR, ["--mmproj"])):
            with doing(f"convert to {name}"):
                _convert(task, staging / name, options)
            counts[name] = num_tensors(staging / name)
        found = _compared(task, staging)
        facts = {"num_tensors": counts, "not_compared": "" if found else f"xllamacpp is not installed: {INSTALL}"}
        return write_copy(staging, task, found, facts, {**TEXTS, "device": "cpu"})


def _convert(task: GgufTask, path: Path, options: list[str]) -> None:
    arguments = [str(task.release_dir), "--outfile", str(path), "--outtype", task.outtype, *options]
    command = [sys.executable, str(task.converter), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == 0 and path.is_file():
        return
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    cause = lines[-1][:300] if lines else f"it ended with {done.returncode} and said nothing"
    if "No module named" in cause:
        raise MachineError(f"llama.cpp's converter lacks a package ({cause}). Install what it needs: {INSTALL}")
    raise ModelError(
        f"llama.cpp's converter does not make {path.name} of {task.release_dir} ({cause}). See all that it says: "
        f"{' '.join(command[:3])} --dry-run {' '.join(options)}".rstrip()
    )


def num_tensors(path: Path) -> int:
    """The number of tensors that a GGUF file's header says.

    Raises:
        IntegrityError: It is no GGUF file, or has none.
    """
    with path.open("rb") as file:
        head = file.read(16)
    count = struct.unpack("<4sIQ", head)[2] if len(head) == 16 and head.startswith(b"GGUF") else 0
    if not count:
        raise IntegrityError(
            f"llama.cpp's converter wrote no GGUF file with tensors ({path.name}). Try another checkout."
        )
    return count


class _InTexts(Loaded):
    """The release; of its prompts the tokens of the texts are compared, which llama.cpp says."""

    def __init__(self, answerer: Answerer) -> None:
        super().__init__(answerer, scores=False)
        self._encoder = answerer.encoder

    def ask(self, row: Row, max_new_tokens: int) -> Told:
        ids = self._encoder.encode_prompt(without_pictures(row)).input_ids
        return replace(super().ask(row, max_new_tokens), prompt_ids=list(ids))


def _compared(task: GgufTask, copy: Path) -> Comparison | None:
    if importlib.util.find_spec("xllamacpp") is None:
        return None
    release = Answerer(task.release_dir, task.turns)
    rows = some_rows(task.rows, task.asked_for)
    longest = max(len(release.encoder.encode_prompt(row).input_ids) for row in rows)
    other: Any = LlamaCpp(
        copy / TEXT, copy / PROJECTOR, system=release.encoder.turns.system,
        num_tokens=longest + task.asked_for.max_new_tokens + 64, num_threads=task.accelerator.num_threads,
    )  # fmt: skip
    own = _InTexts(release)
    own.ask(rows[0], 1)
    other.ask(rows[0], 1)
    return compare(own, other, rows, task.asked_for)
