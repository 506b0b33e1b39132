"""Makes a release's copy with 8-bit weights, in the worker, and compares it with the release."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mllm_assets.artifacts import is_sound, read_manifest, staged_directory
from mllm_assets.evaluation.agreement import Comparison
from mllm_assets.evaluation.same_answers import Loaded, compare, some_rows
from mllm_assets.inference.answerer import Answerer
from mllm_assets.progress import progress_to
from mllm_assets.releases.copies import QuantizeTask, write_copy
from mllm_assets.training.models.device import Device, pick_device
from mllm_assets.training.models.eight_bits import load_8bit, require_installed, without_bars, write_8bit
from mllm_assets.worker.tasks import Manifest

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

TEXTS = {
    "library": "transformers",
    "how": """
The linear layers of the language model have 8-bit weights with a scale for each output channel; embeddings, output
layer, vision tower and projector are as they were. With `pip install compressed-tensors`,
`AutoModelForImageTextToText.from_pretrained` loads it, which unpacks the weights at the first question; vLLM computes
with them packed.""",
}


def quantize_task(task: QuantizeTask, reporter: "Reporter") -> Manifest:
    """Worker entry: write the copy with its card and what it answered, whether or not it answers alike.

    Raises:
        MachineError: `compressed-tensors` is not installed, or the machine does not have the wanted device.
        ModelError: The release cannot be loaded.
        DataError: A row cannot be asked.
    """
    if is_sound(task.directory):
        return read_manifest(task.directory)
    require_installed()
    if task.accelerator.num_threads:
        torch.set_num_threads(task.accelerator.num_threads)
    device = pick_device(task.accelerator.device, warn=reporter.warn)
    with progress_to(reporter.notify), staged_directory(task.directory) as staging:
        num_layers = write_8bit(task.release_dir, staging, task.weights)
        found = _compared(task, staging, device)
        texts = {**TEXTS, "what": f"8-bit weights ({task.weights})", "device": device.kind}
        return write_copy(staging, task, found, {"num_layers": num_layers}, texts)


def _compared(task: QuantizeTask, copy: Path, device: Device) -> Comparison:
    release = Answerer(task.release_dir, task.turns, device=device.kind)
    quantized = Answerer(copy, task.turns, device=device.kind, model=load_8bit(copy, device.kind))
    own, other = Loaded(release, scores=True), Loaded(quantized, scores=True)
    rows = some_rows(task.rows, task.asked_for)
    with without_bars():  # the first question unpacks the weights, and is not timed
        own.ask(rows[0], 1)
        other.ask(rows[0], 1)
    return compare(own, other, rows, task.asked_for)
