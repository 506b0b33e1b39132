"""Which answer stands beside a marked one, and what a batch of them says."""

import torch

from mllm_assets.recipe.preference_keys import PreferenceKeys
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.marked import lenders, note_on_marks
from mllm_assets.training.encoding.row import EncodedRow, no_tokens
from mllm_assets.training.loop.preferences import mark_loss
from mllm_assets.worker.protocol import Reporter


def test_an_answer_is_lent_by_the_row_before_within_a_group() -> None:
    """LLaMA-Factory shifts answers in each group that it maps, and each of its processes maps a stretch of its own."""
    assert list(lenders(5, 1000, None)) == [4, 0, 1, 2, 3]
    assert list(lenders(5, 2, None)) == [1, 0, 3, 2, 4]
    assert list(lenders(5, 1000, 2)) == [2, 0, 1, 4, 3]


def test_a_mark_is_kept_with_its_row_and_one_kind_alone_is_told() -> None:
    def rows(*marks: bool) -> EncodedRows:
        return EncodedRows.of(
            EncodedRow(id=str(n), input_ids=no_tokens(), labels=no_tokens(), mark=mark) for n, mark in enumerate(marks)
        )

    assert [row.mark for row in rows(True, False, True)] == [True, False, True]
    for marks, expected in (
        ((True, False), []),
        ((False, False), ["All 2 answers are marked bad: nothing tells what"]),
    ):
        reporter = Reporter()
        note_on_marks([rows(*marks)], reporter)
        assert [text[: len(e)] for text, e in zip(reporter.warnings, expected, strict=True)] == expected


def test_a_batch_of_one_kind_has_a_finite_loss() -> None:
    """The mean over no good answer is not a number, and poisoned the gradient of the others."""
    spec = PreferenceKeys(stage="kto", pref_ftx=0.5, kto_rejected_weight=2.0)
    logps = torch.tensor([-3.0, -5.0], requires_grad=True)
    tokens, still = torch.tensor([2, 5]), torch.zeros(2)
    found = mark_loss(spec, logps, tokens, logps.detach().clone(), still, torch.tensor([False, False]))
    found.loss.backward()
    assert found.loss.item() == 1.0 and logps.grad is not None and bool(torch.isfinite(logps.grad).all())
