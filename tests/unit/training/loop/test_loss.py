"""The loss over a frozen output layer is the library's, in value and gradient, without its logits."""

import pytest
import torch
from torch.nn import functional

from mllm_assets.training.loop import loss
from mllm_assets.training.loop.loss import frozen_head_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_loss_and_gradient_are_those_of_cross_entropy(dtype: torch.dtype, tolerance: float, smoothing: float) -> None:
    """5000 words do not fill whole blocks, and large logits would overflow without the running maximum."""
    torch.manual_seed(0)
    weight = torch.randn(5000, 24).to(dtype)
    labels = torch.randint(0, 5000, (7,))
    plain = (torch.randn(7, 24) * 20).to(dtype).requires_grad_()
    blocked = plain.detach().clone().requires_grad_()
    expected = functional.cross_entropy(functional.linear(plain, weight).float(), labels, label_smoothing=smoothing)
    found = frozen_head_loss(blocked, weight, labels, smoothing)
    expected.backward()
    (3 * found).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6 if dtype == torch.float32 else 5e-3)
    assert plain.grad is not None and blocked.grad is not None
    torch.testing.assert_close(blocked.grad / 3, plain.grad, atol=tolerance, rtol=tolerance)


def test_places_without_a_label_count_neither_in_the_loss_nor_in_the_gradient() -> None:
    """Rows have as many places as the one with most supervised tokens: no mask that the host must wait for."""
    torch.manual_seed(0)
    weight, labels = torch.randn(60, 8), torch.tensor([3, -100, 59, -100, -100])
    plain = torch.randn(5, 8).requires_grad_()
    blocked = plain.detach().clone().requires_grad_()
    expected = functional.cross_entropy(functional.linear(plain, weight), labels)
    found = frozen_head_loss(blocked, weight, labels)
    (expected + found).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(blocked.grad, plain.grad)
    assert blocked.grad is not None and not blocked.grad[labels < 0].any()


def test_without_a_gradient_none_is_made() -> None:
    hidden, weight = torch.randn(3, 8), torch.randn(50, 8)
    with torch.no_grad():
        found = frozen_head_loss(hidden, weight, torch.tensor([1, 2, 3]))
    assert not found.requires_grad


def test_an_output_layer_that_trains_keeps_the_librarys_loss() -> None:
    class Model(torch.nn.Module):
        def __init__(self, *, trains: bool) -> None:
            super().__init__()
            self.embeddings, self.lm_head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9, bias=False)
            self.lm_head.weight = self.embeddings.weight
            self.embeddings.weight.requires_grad_(trains)
            self.config = self
            self._loss_function = None

        def get_text_config(self) -> object:
            return object()

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.lm_head

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.embeddings

    assert not loss.install(Model(trains=True))
    frozen = Model(trains=False)
    assert loss.install(frozen) and not isinstance(frozen.lm_head, torch.nn.Linear)
    loss.uninstall(frozen)
    assert isinstance(frozen.lm_head, torch.nn.Linear)
