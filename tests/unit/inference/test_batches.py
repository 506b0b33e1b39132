"""How many rows are asked at once: by what a GPU holds, halved where it does not, and of no weight for what is said."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.rows import Message, Row
from mllm_assets.errors import OutOfMemoryError
from mllm_assets.evaluation import predict
from mllm_assets.evaluation.predict import evaluate_task, merge
from mllm_assets.inference import batch_size
from mllm_assets.inference.answerer import Answerer, token_losses
from mllm_assets.inference.batch_size import bytes_of, rows_at_once
from mllm_assets.inference.batches import Pass, in_batches
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.loop.memory import FRAGMENTATION, WORKSPACE_GIB
from mllm_assets.training.models.device import GIB, Device
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import EvaluationSettings, Measured, Part
from tests import tiny_families
from tests.fake_cuda import Peak, fake_cuda, to_fake
from tests.worker_tasks import evaluation

pytestmark = pytest.mark.not_fast
GOLDEN = Path(__file__).parents[2] / "golden" / "parity"
CPU = Device(kind="cpu", name="", driver="", memory_gib=64.0)


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    torch.set_num_threads(1)
    return Answerer(GOLDEN / "model")


@pytest.fixture(scope="module")
def rows(answerer: Answerer) -> EncodedRows:
    rows = Dataset(GOLDEN / "data").entry("gemma3_vlm_train").rows
    return EncodedRows.of(map(answerer.encoder.encode, rows), answerer.encoder.image_token_id)


def card_for(answerer: Answerer, num_bytes: float) -> Device:
    """A card with just so much free for what is computed."""
    weights = sum(p.numel() * p.element_size() for p in answerer.model.parameters())
    free_gib = (weights + num_bytes) / GIB * FRAGMENTATION + WORKSPACE_GIB + 1e-5
    return Device(kind="cuda", name="a card", driver="", memory_gib=80.0, free_gib=free_gib)


@pytest.mark.parametrize("num_new_tokens", [None, 64], ids=["scoring", "answering"])
def test_a_gpu_is_asked_about_as_many_rows_as_its_free_memory_holds(
    answerer: Answerer, rows: EncodedRows, num_new_tokens: int | None
) -> None:
    """It was 16 on every card, whatever was free."""
    taken = {size: bytes_of(answerer, rows, size, num_new_tokens=num_new_tokens) for size in (16, 32, 48)}
    assert taken[32] == pytest.approx(2 * taken[16], rel=0.05) and taken[48] == pytest.approx(3 * taken[16], rel=0.05)
    sizes = [
        rows_at_once(answerer, rows, card_for(answerer, num_bytes), num_new_tokens=num_new_tokens)
        for num_bytes in (taken[48] * 1.01, taken[32] * 1.2, taken[16] * 1.2)
    ]
    assert sizes == [64, 32, 16]
    assert rows_at_once(answerer, rows, CPU) == rows_at_once(answerer, rows[:16], card_for(answerer, 1e9)) == 16


def test_a_family_that_reads_its_inputs_is_asked_as_usual_also_where_no_row_has_a_picture(tmp_path: Path) -> None:
    """A batch without pictures carries a blank one while it is scored, whose grid of patches the model reads."""
    tiny_families.build("qwen2_5_vl", tmp_path)
    qwen = Answerer(tmp_path)
    text = Row("a", (Message("user", "1 + 1?"), Message("assistant", "2")), ())
    encoded = EncodedRows.of([qwen.encoder.encode(text)] * 20)
    assert rows_at_once(qwen, encoded, card_for(qwen, 1e9)) == 16


def test_scoring_on_fake_cuda_takes_what_was_reckoned_and_stays_on_the_device(
    answerer: Answerer, rows: EncodedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = batch_size.model_on_meta(answerer.model.config, dtype=answerer.model.dtype).eval()
    batch = answerer.collator(rows[:32])
    most = max(row.num_supervised for row in rows)
    longest = max(len(row.input_ids) for row in rows)
    with fake_cuda(), torch.no_grad(), batch_size.without_waiting_checks():
        to_fake(shape)
        ids, places = (torch.zeros(32, size, dtype=torch.long, device="cuda") for size in (-(-longest // 8) * 8, most))
        pixels = torch.empty(batch["pixel_values"].shape, device="cuda")
        with Peak() as counted:
            for tensor in (*shape.parameters(), *shape.buffers(), ids, pixels):
                counted.add(tensor)
            held = counted.now
            losses = token_losses(shape, {
                "input_ids": ids, "token_type_ids": ids, "attention_mask": ids, "pixel_values": pixels,
                "logits_to_keep": places, "shift_labels": places,
            })  # fmt: skip
        assert (losses.device.type, tuple(losses.shape), losses.dtype) == ("cuda", (32, most), torch.float32)
    assert not counted.waits
    inputs = pixels.numel() * 4 + ids.numel() * 8
    assert bytes_of(answerer, rows, 32) == pytest.approx(counted.highest - held + inputs, rel=0.08)


@contextmanager
def memory_for(num_rows: int) -> Iterator[list[int]]:
    """What PyTorch raises where a forward pass of the text model has more rows; yields the sizes of all that passed."""
    passed: list[int] = []

    def limit(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if type(module).__name__ == "Gemma3TextScaledWordEmbedding":
            if len(inputs[0]) > num_rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            passed.append(len(inputs[0]))

    with torch.nn.modules.module.register_module_forward_pre_hook(limit):
        yield passed


def asked(folder: Path, **settings: Any) -> tuple[dict[str, Any], list[str]]:
    """The manifest and the warnings of 8 samples' predictions."""
    reporter = Reporter()
    task = evaluation(
        model_dir=GOLDEN / "model", data_dir=GOLDEN / "data", directory=folder, max_new_tokens=6, **settings
    )
    return evaluate_task(task, reporter).manifest, reporter.warnings


@pytest.mark.slow
def test_what_does_not_fit_is_halved_is_said_and_changes_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory ended the whole evaluation, minutes into it."""
    expected, said = asked(tmp_path / "usual")
    assert not said and expected["batch_sizes"]["tuned"] == {"losses": 16, "shuffled_losses": 16, "answers": 16}
    monkeypatch.setattr(predict, "rows_at_once", lambda *_, **__: 64)
    chosen, said = asked(tmp_path / "forced")
    assert not said and chosen["batch_sizes"]["base"] == {"losses": 64, "shuffled_losses": 64, "answers": 64}
    assert chosen["digest"] == expected["digest"], "8 rows are one batch"
    with memory_for(3) as passed:
        halved, said = asked(tmp_path / "halved")
    assert max(passed) == 2 and set(halved["batch_sizes"]["tuned"].values()) == {2}
    assert said[0] == "Memory does not hold 8 rows at once (losses): from now on 4." and len(said) == 6
    answers = [predict.pq.read_table(tmp_path / name / "predictions.parquet") for name in ("usual", "halved")]
    assert answers[0]["answer"] == answers[1]["answer"]
    for column in ("loss_nats", "loss_shuffled_nats"):
        assert answers[1][column].to_pylist() == pytest.approx(answers[0][column].to_pylist(), abs=1e-5)


def test_drawn_answers_are_never_of_another_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are drawn for a batch together, so that those of two halves are other ones."""
    monkeypatch.setattr(predict, "rows_at_once", lambda *_, **__: 64)
    drawn, _ = asked(tmp_path / "drawn", do_sample=True)
    assert drawn["batch_sizes"]["base"] == {"losses": 64, "shuffled_losses": 64, "answers": 16}
    with memory_for(3), pytest.raises(OutOfMemoryError, match=r"^Out of memory answering 8 rows at once: .* Ask fewer"):
        asked(tmp_path / "halved", do_sample=True)


def test_one_row_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with memory_for(0), pytest.raises(OutOfMemoryError, match=r"^Out of memory scoring 1 rows at once: CUDA out of"):
        asked(tmp_path / "none")


def test_rows_after_a_batch_that_was_halved_are_asked_about_once(answerer: Answerer, rows: EncodedRows) -> None:
    """The places went on by the smaller size, so that what had just been answered was asked again."""
    asked: list[EncodedRow] = []

    def run(some: Sequence[EncodedRow], batch: Any) -> list[None]:
        if len(some) > 2:
            raise OutOfMemoryError("as of a GPU")
        asked.extend(some)
        return [None] * len(some)

    one = Pass(name="losses", rows=rows[:12], collator=answerer.collator, run=run, size=4, unit=4)
    assert sum(len(positions) for _, positions, _ in in_batches([one])) == 12
    assert len(asked) == 12


def test_parts_share_the_rows_whatever_each_of_them_holds_at_once(answerer: Answerer, rows: EncodedRows) -> None:
    """Two machines that chose different batches would have left rows out, or done them twice."""

    def taken(part: Part, size: int) -> list[int]:
        one = Pass(name="losses", rows=rows, collator=answerer.collator, run=_nothing, size=size, unit=4)
        return [position for batch in one.batches(part) for position in batch]

    first, second = taken(Part(index=0, count=2), 16), taken(Part(index=1, count=2), 4)
    assert sorted([*first, *second]) == list(range(len(rows)))
    parts = [Measured(losses={}, shuffled_losses={}, answers={}, batch_sizes={"losses": size}) for size in (64, 32)]
    assert merge(parts).batch_sizes == {"losses": 32}


def _nothing(rows: Sequence[EncodedRow], batch: Any) -> list[None]:
    return [None] * len(rows)


def test_predictions_have_the_name_of_those_that_were_made_16_at_once() -> None:
    recipe = evaluation(model_dir=GOLDEN / "model", data_dir=GOLDEN / "data", directory=Path("p")).recipe
    assert EvaluationSettings().conditions(recipe) == EvaluationSettings(batch_size=16).conditions(recipe)


def test_pictures_decoded_in_other_processes_give_the_same_predictions_to_the_bit(tmp_path: Path) -> None:
    alone, _ = asked(tmp_path / "alone", batch_size=3)
    task = evaluation(model_dir=GOLDEN / "model", data_dir=GOLDEN / "data", directory=tmp_path / "p")
    recipe = replace(task.recipe, dataloader_num_workers=2)
    shared, _ = asked(tmp_path / "shared", batch_size=3, recipe=recipe)
    assert shared["digest"] == alone["digest"]
