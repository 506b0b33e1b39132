"""The parts of the check of a GPU that load PyTorch's device; each runs in a process of its own, forked by gpu.py.

A part returns what it measured and, apart from it, what was only reckoned.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3TextConfig,
    SiglipVisionConfig,
    TrainerCallback,
)

from mllm_assets.artifacts import write_manifest
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import MachineError
from mllm_assets.inference.generate import answer_files, open_model
from mllm_assets.layout import Layout
from mllm_assets.recipe.asking import Sampling
from mllm_assets.recipe.load import load_recipe
from mllm_assets.training.caches import shards, tower
from mllm_assets.training.loop import engine, simulation
from mllm_assets.training.models import tiny
from mllm_assets.training.models.device import GIB, Precision, pick_device
from mllm_assets.training.models.load import load_model
from mllm_assets.training.runs.models import NamedModel
from mllm_assets.training.runs.plan import plan_run
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import Accelerator, CacheSettings, TrainTask

TEXT = {"vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": 1024, "max_position_embeddings": 131072}  # fmt: skip
VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
          "image_size": 896, "patch_size": 14, "vision_use_head": False}  # fmt: skip
NUM_IMAGE_TOKENS = 256
PROFILED_STEPS = (3, 4)
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize", "cudaDeviceSynchronize")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A folder with `data/`, `pretrains/` and `outputs/`, and what computes."""

    root: Path
    device: str

    def task(self, recipe: Path, *, caches: bool = True) -> TrainTask:
        """The task of a run, as `mllm-assets train` would give it to its worker."""
        dataset = Dataset(self.root / "data", read_part=None)
        plan = plan_run(load_recipe(recipe), root=self.root, dataset=dataset)
        layout = Layout(self.root)
        settings = CacheSettings(
            features_root=layout.features, hidden_states_root=layout.hidden_states, weights_root=layout.frozen_weights
        )
        threads = 1 if self.device == "cpu" else None
        accelerator = Accelerator(device=self.device, num_threads=threads)  # pyright: ignore[reportArgumentType]
        return replace(plan.task, caches=settings if caches else CacheSettings(), accelerator=accelerator)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def versions(bench: Bench) -> dict[str, Any]:
    import accelerate
    import peft
    import transformers

    device = pick_device(bench.device)
    found = {module.__name__: module.__version__ for module in (torch, transformers, accelerate, peft)}
    measured = {"device": device.name, "driver": device.driver, "memory_gib": device.memory_gib,
                "free_gib": device.usable_gib, "num_cpus": os.cpu_count()}  # fmt: skip
    return {"versions": found, "measured": measured}


def ceilings(bench: Bench) -> dict[str, Any]:
    """What the card gives at best: products, copies, and attention with Gemma's mask by kernel."""

    def median_s(call: Callable[[], Any], repeats: int = 10) -> float:
        times = []
        for _ in range(repeats + 3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return sorted(times[3:])[repeats // 2]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    square, mlp, measured = random(8192, 8192), random(2560, 10240), {}
    measured["matmul_tflops"] = 2 * 8192**3 / median_s(lambda: square @ square) / 1e12
    for num_tokens in (608, 1216, 4864):  # of micro-batches of 2, 4 and 16 rows
        states = random(num_tokens, 2560)
        seconds = median_s(lambda states=states: states @ mlp)
        measured[f"mlp_tflops_{num_tokens}_tokens"] = 2 * num_tokens * 2560 * 10240 / seconds / 1e12
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    measured["copy_gb_per_s"] = 2 * 2**30 / median_s(lambda: target.copy_(source)) / 1e9
    for name, pinned in (("pageable", False), ("pinned", True)):
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=pinned)
        measured[f"to_device_gb_per_s_{name}"] = 2**28 / median_s(lambda host=host: target[: 2**28].copy_(host)) / 1e9
    query, key, value = (random(4, 8, 304, 256).requires_grad_() for _ in range(3))
    mask = torch.ones(304, 304, device="cuda", dtype=torch.bool).tril().expand(4, 1, 304, 304)
    attention = torch.nn.functional.scaled_dot_product_attention
    for kernel in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(kernel):
            try:
                took = median_s(lambda: attention(query, key, value, attn_mask=mask).sum().backward())
                measured[f"masked_attention_us_{kernel.name}"] = took * 1e6
            except RuntimeError as error:
                measured[f"masked_attention_us_{kernel.name}"] = str(error)[:120]
    return {"measured": measured}


def make_model(bench: Bench, name: str, *, num_layers: int, num_vision_layers: int) -> dict[str, Any]:
    """Write a Gemma 3 of gemma-3-4b's widths with random weights in bf16; the demo's own where there are no layers."""
    directory, started_s = bench.root / "pretrains" / name, time.monotonic()
    if not num_layers:
        tiny.build(directory)
    else:
        _make_wide_model(directory, bench.device, num_layers, num_vision_layers)
    num_bytes = sum(path.stat().st_size for path in directory.iterdir())
    return {"measured": {"wall_s": time.monotonic() - started_s, "gib": num_bytes / GIB}}


def _make_wide_model(directory: Path, device: str, num_layers: int, num_vision_layers: int) -> None:
    tokenizer = tiny.build_tokenizer()
    small = tiny.build_config(tokenizer)
    ids = {name: getattr(small, name) for name in ("boi_token_index", "eoi_token_index", "image_token_index")}
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**(TEXT | {"num_hidden_layers": num_layers}), **special),
        vision_config=SiglipVisionConfig(**(VISION | {"num_hidden_layers": num_vision_layers})),
        mm_tokens_per_image=NUM_IMAGE_TOKENS, eos_token_id=small.eos_token_id, tie_word_embeddings=True, **ids,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)
    model.to_empty(device=device)
    model.tie_weights()
    torch.manual_seed(tiny.SEED)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "vision_tower" in key and key.endswith("weight") else 0.0)
            elif "embed" in key:
                parameter.normal_(0, 0.02)
            else:
                fan_in = parameter.shape[0] if "input_projection" in key else math.prod(parameter.shape[1:])
                parameter.normal_(0, 1 / math.sqrt(fan_in))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    processor = tiny.processor_config()
    processor["image_seq_length"] = processor["image_processor"]["image_seq_length"] = NUM_IMAGE_TOKENS
    processor["image_processor"]["size"] = {"height": VISION["image_size"], "width": VISION["image_size"]}
    (directory / "processor_config.json").write_text(json.dumps(processor))
    write_manifest(directory, {"model": "random weights"})


def features(bench: Bench, model_dir: Path) -> dict[str, Any]:
    """How far the size of a batch moves what is cached of an image, against what a run allows; time of an image."""
    model = load_model(model_dir, dtype=torch.bfloat16).eval()
    tower.move(model, bench.device)
    precision = Precision(weights=torch.bfloat16, autocast="bf16")
    side = model.config.vision_config.image_size
    sizes = (1, 8, 32) if bench.device == "cuda" else (1, 4)
    pixels = torch.randn(sizes[-1], 3, side, side)
    ms_an_image, moved, first = {}, {}, None
    for size in sizes:
        for _ in range(3):  # the last one counts: kernels load and are chosen in the first
            bench.wait()
            started_s = time.perf_counter()
            rows = tower.image_rows(model, {"pixel_values": pixels[:size]}, precision)
            bench.wait()
            ms_an_image[size] = (time.perf_counter() - started_s) * 1e3 / size
        first = rows[0].float() if first is None else first
        moved[size] = float((rows[0].float() - first).abs().max() / first.abs().max())
    allowed = shards.TOLERANCE[precision.computed]
    measured = {"ms_an_image": ms_an_image, "moved_by_batch": moved, "bytes_an_image": rows[0].nbytes}
    return {"measured": measured, "allowed": allowed, "passed": max(moved.values()) <= allowed}


class StepTimes(TrainerCallback):
    """The moment at which the device ended each step; two of them under PyTorch's profiler if asked."""

    def __init__(self, bench: Bench, *, profiled: bool) -> None:
        self.bench, self.profiled = bench, profiled
        self.ends_s: list[float] = []
        self.profiler: profile | None = None
        self.facts: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bench.wait()
        self.ends_s.append(time.perf_counter())
        if self.profiled and state.global_step == PROFILED_STEPS[0] - 1:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.bench.device == "cuda" else [])]
            self.profiler = profile(activities=kinds)
            self.profiler.__enter__()
        elif self.profiler is not None and state.global_step == PROFILED_STEPS[1]:
            self.profiler.__exit__(None, None, None)
            self._read(self.profiler, self.ends_s[-1] - self.ends_s[-1 - len(PROFILED_STEPS)])
            self.profiler = None

    def _read(self, profiler: profile, wall_s: float) -> None:
        events, steps = profiler.key_averages(), len(PROFILED_STEPS)
        busiest = sorted(events, key=lambda event: -event.self_device_time_total)[:10]
        self.facts = {
            "num_kernels": sum(event.count for event in events if "CUDA" in str(event.device_type)) / steps,
            "device_busy_share": sum(event.self_device_time_total for event in events) / 1e6 / wall_s,
            "num_waits": {event.key: event.count / steps for event in events if event.key in WAITS},
            "busiest_ms": {event.key[:60]: event.self_device_time_total / 1e3 / steps for event in busiest},
        }

    def step_s(self) -> float | None:
        """The median, without the steps in which kernels are loaded and chosen."""
        took = sorted(end - begin for begin, end in zip(self.ends_s[2:], self.ends_s[3:], strict=False))
        return took[len(took) // 2] if took else None


def train(
    bench: Bench, recipe: Path, *, caches: bool = True, publishes: bool = False, profiled: bool = False
) -> dict[str, Any]:
    """One run by the product's own phases: their times, a step's, its memory, and its losses."""
    task, reporter, phases_s = bench.task(recipe, caches=caches), Reporter(), {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        started_s = time.monotonic()
        yield
        bench.wait()
        phases_s[name] = time.monotonic() - started_s

    with phase("open"):
        setup = engine.open_run(task, reporter)
    with phase("prepare"):
        prepared = engine.prepare_run(task, setup, reporter)
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    setup, times = prepared.setup, StepTimes(bench, profiled=profiled)
    prepared.trainer.add_callback(times)
    with phase("train"):
        trained = engine.train(prepared, reporter)
    measured = {"phases_s": phases_s, "step_s": times.step_s(), "facts": trained.facts, **times.facts}
    measured["losses"] = [line["loss"] for line in prepared.trainer.state.log_history if "loss" in line]
    reckoned = {"memory_gib": prepared.needed.total_gib}
    if bench.device == "cuda":
        measured["memory_gib"] = torch.cuda.max_memory_allocated() / GIB
        measured["memory_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        measured["memory_against_estimate"] = measured["memory_gib"] / prepared.needed.total_gib - 1
    if publishes:
        with phase("publish"):
            measured["reload"] = engine.publish(task, prepared, trained)
    step_s, spec = times.step_s(), setup.spec
    if step_s:
        num_rows = spec.per_device_train_batch_size * spec.gradient_accumulation_steps
        measured |= {"ms_a_row": step_s * 1e3 / num_rows, "rows_per_s": num_rows / step_s}
        reckoned["tflop_a_step"] = _tflop(prepared) * spec.gradient_accumulation_steps
        reckoned["tflop_per_s"] = reckoned["tflop_a_step"] / step_s
    return {"device": str(prepared.trainer.args.device), "checkpointed": setup.checkpointed,
            "caches": dict(prepared.plan.facts), "run_dir": str(task.run_dir), "measured": measured,
            "reckoned": reckoned}  # fmt: skip


def _tflop(prepared: engine.Prepared) -> float:
    """Of one micro-batch on fake tensors, with nothing computed twice."""
    simulation._KNOWN.clear()  # what is known already would not be counted
    with FlopCounterMode(display=False) as counter:
        simulation.simulate(prepared.setup, prepared.plan, checkpointed=False)
    return counter.get_total_flops() / 1e12


def train_whole(bench: Bench, recipe: Path) -> dict[str, Any]:
    """A run to its manifest, or the rest of one that was killed."""
    task = bench.task(recipe)
    manifest = engine.train_task(task, Reporter())
    return {"run_dir": str(task.run_dir), "resumed_from_step": manifest["resumed_from_step"]}


def generate(bench: Bench, run_dir: Path) -> dict[str, Any]:
    """Answers of what was published, to eight pictures at once."""
    answerer = open_model(NamedModel(name="trained", directory=run_dir / "model"), device=bench.device)
    images = sorted((bench.root / "data" / "images").iterdir())[:8]
    sampling, answers = Sampling(max_new_tokens=32), []
    for _ in range(2):  # kernels load in the first
        bench.wait()
        started_s = time.perf_counter()
        answers = list(answer_files(answerer, images, "Describe this picture.", sampling, batch_size=len(images)))
        bench.wait()
        took_s = time.perf_counter() - started_s
    num_tokens = sum(getattr(answer, "num_tokens", 0) for _, answer in answers)
    return {"measured": {"num_answers": len(answers), "wall_s": took_s, "tokens_per_s": num_tokens / took_s}}


def refuse(bench: Bench, recipe: Path) -> dict[str, Any]:
    """A batch that cannot fit is refused before its model loads."""
    task = bench.task(recipe)
    try:
        engine.prepare_run(task, engine.open_run(task, Reporter()), Reporter())
    except MachineError as error:
        return {"passed": True, "message": str(error)}
    return {"passed": False, "message": "a step of that many rows was not refused"}


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
