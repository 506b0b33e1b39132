"""Device, precision, memory, and numbers that are none: each message says what to do."""

import dataclasses
import math
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mllm_assets.errors import MachineError, OutOfMemoryError, RecipeError
from mllm_assets.families.family import FAMILIES, require_attention
from mllm_assets.file_digests import FileDigests
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.caches.prepare import CachePlan, Setup
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.inputs import Inputs
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.loop import memory
from mllm_assets.training.loop.memory import MemoryEstimate
from mllm_assets.training.loop.reporting import SkippedSteps, check_finite, plot_loss
from mllm_assets.training.models import freezing
from mllm_assets.training.models.device import (
    Device,
    Precision,
    notes_on_precision,
    out_of_memory_is_an_error,
    pick_device,
    pick_precision,
)
from mllm_assets.training.models.kernels import require_kernels
from mllm_assets.training.models.load import load_config, load_model, model_on_meta
from mllm_assets.training.models.quantization import Quantization
from mllm_assets.training.runs.history import read_log
from mllm_assets.worker.tasks import CacheSettings

CPU = Device(kind="cpu", name="a CPU", driver="", memory_gib=8.0)


def make_spec(**values: Any) -> TrainSpec:
    return TrainSpec(model_name_or_path="m", dataset="d", template="gemma3", do_train=True, **values)


def estimate(spec: TrainSpec, shape: freezing.TrainableSet, quantization: Quantization | None = None) -> MemoryEstimate:
    """What a run of one row with 64 tokens, 8 of them supervised, and one image takes on a CPU."""
    labels = array("i", [-100] * 56 + [1] * 8)
    row = EncodedRow(id="a", input_ids=array("i", [1] * 64), labels=labels, images=(Path("a.png"),))
    setup = Setup(
        spec=spec,
        model_dir=Path("m"),
        inputs=Inputs(
            processor=None, train_rows=EncodedRows.of([row]), eval_rows=EncodedRows.of([]), digests=FileDigests()
        ),
        device=CPU,
        precision=Precision(weights=torch.float32, autocast=None, quantization=quantization),
        shape=shape,
        caches=CacheSettings(),
    )
    return memory.estimate(setup, CachePlan(tower=False, boundary=None, facts={}))


def test_cuda_asked_for_and_absent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that a machine with a GPU runs this test too
    with pytest.raises(
        MachineError, match=r"The device cuda was asked for, and this machine has only .*cpu.* (hides|built without)"
    ) as e:
        pick_device("cuda")
    assert "or set device: auto" in str(e.value)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(MachineError, match=r"device is 'tpu': expected auto, cuda, mps or cpu"):
        pick_device("tpu")


def test_the_device_is_named_with_its_memory() -> None:
    device = pick_device("cpu")
    assert device.kind == "cpu" and device.name and device.memory_gib > 0.5


def test_the_recipes_use_cpu_wins_over_auto() -> None:
    assert pick_device("auto", use_cpu=True).kind == "cpu"


def test_fp16_on_the_cpu_is_refused() -> None:
    with pytest.raises(MachineError, match=r"fp16 needs a CUDA device, and this run is on cpu"):
        pick_precision(make_spec(fp16=True), CPU)


def test_flash_attention_that_cannot_run_is_refused_and_eager_is_another_precision() -> None:
    """Cached features of eager and sdpa differ in their last bits, and are named by the precision."""
    with pytest.raises(MachineError, match=r"flash_attn: fa2 needs a CUDA device, and this run is on cpu\. Set flash"):
        pick_precision(make_spec(flash_attn="fa2", bf16=True), CPU)
    with pytest.raises(MachineError, match=r"flash_attn: fa2 computes in 16 bits, and this run in 32\. Set flash_attn"):
        pick_precision(make_spec(flash_attn="fa2"), dataclasses.replace(CPU, kind="cuda"))
    with pytest.raises(RecipeError, match=r"flash_attn is fa2, .* in Gemma 3 .* Set flash_attn: auto"):
        require_attention("fa2", FAMILIES["gemma3"])
    require_attention("fa2", FAMILIES["qwen2_5_vl"])
    eager, usual = (pick_precision(make_spec(flash_attn=name), CPU) for name in ("disabled", "sdpa"))
    assert eager.describe() == "float32, autocast None, eager attention"
    assert usual == pick_precision(make_spec(), CPU)


def test_bf16_means_bf16_weights_under_autocast() -> None:
    assert pick_precision(make_spec(bf16=True), CPU) == Precision(weights=torch.bfloat16, autocast="bf16")
    assert pick_precision(make_spec(), CPU) == Precision(weights=torch.float32, autocast=None)


def test_quantisation_without_bitsandbytes_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MachineError, match=r"quantization_bit: 4 needs bitsandbytes, .*pip install .*\[qlora\]"):
        pick_precision(make_spec(quantization_bit=4), CPU)


def test_quantisation_on_metal_is_refused() -> None:
    with pytest.raises(MachineError, match=r"quantization_bit needs a CUDA device, .* this run is on mps\. Delete"):
        pick_precision(make_spec(quantization_bit=8), dataclasses.replace(CPU, kind="mps"))


@pytest.mark.parametrize(("bits", "double", "bytes_a_weight"), [(4, True, 0.516), (4, False, 0.5625), (8, True, 1.05)])
def test_the_estimate_counts_quantised_layers_by_their_bits(
    parity_dir: Path, bits: int, double: bool, bytes_a_weight: float
) -> None:
    spec = make_spec(quantization_bit=bits)
    shape = freezing.apply(spec, model_on_meta(load_config(parity_dir / "model")))
    linear = [
        module.weight
        for name, module in shape.model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and "lm_head" not in name
    ]
    num_quantized = sum(weight.numel() for weight in linear)
    assert num_quantized > 150_000

    whole = estimate(spec, shape)
    quantized = estimate(spec, shape, Quantization(bits=bits, type="nf4", double=double))
    saved = (whole.weights_gib - quantized.weights_gib) * 2**30
    assert saved == pytest.approx(num_quantized * (4 - bytes_a_weight), rel=0.02)
    assert quantized.merge_gib == pytest.approx(whole.weights_gib)


def test_a_run_whose_unquantised_model_does_not_fit_is_refused() -> None:
    needed = MemoryEstimate(weights_gib=1, gradients_gib=0, optimizer_gib=0, activations_gib=1, merge_gib=9)
    with pytest.raises(MachineError, match=r"needs about 9\.0 GiB .*weights 9\.0.* has 8\.0 GiB\. No change"):
        memory.require_memory(needed, CPU, lambda: None)


def test_a_run_that_cannot_fit_is_refused_with_its_parts_and_what_would_fit() -> None:
    needed = MemoryEstimate(weights_gib=1.0, gradients_gib=1.0, optimizer_gib=2.0, activations_gib=9.0)
    with pytest.raises(MachineError, match=r"needs about 13\.0 GiB .*a CPU \(cpu\) has 8\.0 GiB\. With bf16: true"):
        memory.require_memory(needed, CPU, lambda: "With bf16: true")
    fits = MemoryEstimate(weights_gib=1, gradients_gib=1, optimizer_gib=2, activations_gib=1)
    memory.require_memory(fits, CPU, lambda: pytest.fail("nothing is looked for"))


def test_the_estimate_counts_three_copies_of_what_trains(parity_dir: Path) -> None:
    spec = make_spec(finetuning_type="full", freeze_multi_modal_projector=False)
    trainable = freezing.apply(spec, model_on_meta(load_config(parity_dir / "model")))
    needed = estimate(spec, trainable)
    assert needed.weights_gib == pytest.approx(265_088 * 4 / 2**30)
    assert needed.gradients_gib == pytest.approx(228_576 * 4 / 2**30)
    assert needed.optimizer_gib == pytest.approx(2 * needed.gradients_gib)
    assert needed.activations_gib > 0


def test_a_step_that_is_not_finite_is_named_with_its_samples() -> None:
    batches = [(["a", "b"], 1.0), (["c"], math.nan)]
    with pytest.raises(
        RecipeError, match=r"Step 12 is not finite: loss nan, .* with the samples c\. .* Lower learning"
    ):
        check_finite(12, batches, math.nan)
    with pytest.raises(RecipeError, match=r"gradient norm inf, with the samples a, b, d\."):
        check_finite(12, [(["a", "b"], 1.0), (["d"], 2.0)], math.inf)
    check_finite(12, [(["a"], 1.0)], 3.0)


def test_fp16_may_skip_steps_while_its_scale_falls_and_no_longer() -> None:
    """A run whose gradients overflow at any scale skipped each step to its end, and published its base."""
    skipped, inf = SkippedSteps(), math.inf
    assert all(skipped.tolerates(norm) for norm in [*[inf] * 16, 1.0, *[math.nan] * 19])
    assert not skipped.tolerates(inf)


def test_fp16_is_warned_of_where_the_family_overflows() -> None:
    half, brain = (Precision(weights=dtype, autocast=None) for dtype in (torch.float16, torch.bfloat16))
    [note] = notes_on_precision(half, FAMILIES["gemma3"])
    assert "fp16: true overflows in Gemma 3" in note and "fp16: false on a card without bf16" in note
    assert not [*notes_on_precision(brain, FAMILIES["gemma3"]), *notes_on_precision(half, FAMILIES["llava"])]


def test_a_log_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "trainer_log.jsonl"
    path.write_text('{"current_steps": 1, "loss": 2.0}\n{"current_steps": 2, "lo')
    assert read_log(path) == [{"current_steps": 1, "loss": 2.0}]


def test_the_plot_is_drawn_from_the_log_and_fits_dagsters_window(tmp_path: Path) -> None:
    lines = "".join(f'{{"current_steps": {step}, "loss": {10 - step}}}\n' for step in range(1, 9))
    (tmp_path / "trainer_log.jsonl").write_text(lines + '{"current_steps": 8, "eval_loss": 2.5}\n')
    path = plot_loss(tmp_path)
    assert path is not None
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width <= 900


def test_a_single_point_is_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "trainer_log.jsonl").write_text('{"current_steps": 1, "loss": 2.0}\n')
    assert plot_loss(tmp_path) is None and not (tmp_path / "training_loss.png").exists()


def estimate_of(spec: TrainSpec) -> MemoryEstimate:
    return MemoryEstimate(
        weights_gib=1, gradients_gib=0, optimizer_gib=0, activations_gib=spec.per_device_train_batch_size
    )


@pytest.mark.parametrize(("memory_gib", "grouping"), [(100, (12, 1)), (8, (4, 3)), (3.8, (2, 6)), (1, (2, 6))])
def test_the_largest_micro_batch_that_fits_keeps_the_samples_of_a_step(
    memory_gib: float, grouping: tuple[int, int]
) -> None:
    device = Device(kind="cpu", name="a CPU", driver="", memory_gib=memory_gib)
    spec = make_spec(per_device_train_batch_size=2, gradient_accumulation_steps=6)
    found = memory.largest_micro_batch(spec, device, estimate_of)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == grouping


@pytest.mark.parametrize("error", [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to"),
])  # fmt: skip
def test_a_failed_allocation_names_the_setting(error: BaseException) -> None:
    with (
        pytest.raises(MachineError, match=r"^Out of memory in step 3: .* Lower it\.$"),
        out_of_memory_is_an_error("in step 3", "Lower it."),
    ):
        raise error


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="^shapes differ$"), out_of_memory_is_an_error("in step 3", "x"):
        raise RuntimeError("shapes differ")


def test_layers_are_compiled_only_where_a_compiler_is(monkeypatch: pytest.MonkeyPatch) -> None:
    require_kernels(make_spec(), "mps")
    spec = make_spec(torch_compile=True)
    with pytest.raises(MachineError, match="needs a CUDA device or a CPU, and this run is on mps. Delete it"):
        require_kernels(spec, "mps")
    with (
        monkeypatch.context() as patch,
        pytest.raises(MachineError, match=r"Python's headers.*install python3\.\d+-dev"),
    ):
        patch.setattr("sysconfig.get_path", lambda name: "/nowhere")
        require_kernels(spec, "cpu")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MachineError, match=r"needs a C\+\+ compiler, and none of g\+\+, .* is in PATH. Install one"):
        require_kernels(spec, "cpu")


def test_a_model_that_bitsandbytes_cannot_hold_is_not_told_to_be_downloaded_again(
    parity_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its build did not fit the machine's CUDA, and the weights were blamed."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA Setup failed despite CUDA being available")

    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", fail)
    with pytest.raises(MachineError, match=r"in 4 bits \(RuntimeError: CUDA Setup failed.*See what python -m bitsandb"):
        load_model(parity_dir / "model", quantization=Quantization(bits=4, type="nf4", double=True))


@pytest.mark.parametrize("said", ["CUDA error: out of memory", "[enforce fail] DefaultCPUAllocator: can't allocate"])
def test_memory_that_ends_while_weights_are_read_is_not_told_as_damage(
    parity_dir: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", fail)
    with pytest.raises(OutOfMemoryError, match="^Out of memory here: "), out_of_memory_is_an_error("here", "x"):
        load_model(parity_dir / "model")
