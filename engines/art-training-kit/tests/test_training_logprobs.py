from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from art_training_kit.logprobs import next_token_logprobs


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_logprobs_entropies_and_gradients_equal_the_full_matrix(chunk: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 12, requires_grad=True), torch.randn(40, 12)
    parent, target = torch.tensor([0, 0, 2, 3, 6, 6, 6, 1]), torch.tensor([1, 5, 39, 0, 7, 8, 9, 20])
    logprobs, entropy = next_token_logprobs(hidden, weight, parent, target, chunk=chunk)
    full = torch.log_softmax(hidden @ weight.T, -1)
    assert torch.allclose(logprobs, full[parent, target], atol=1e-5)
    assert torch.allclose(entropy, -(full.exp() * full).sum(-1), atol=1e-5)
    assert not entropy.requires_grad
    direction = torch.randn(8)
    (ours,) = torch.autograd.grad(logprobs, hidden, direction)
    (exact,) = torch.autograd.grad(full[parent, target], hidden, direction)
    assert torch.allclose(ours, exact, atol=1e-5)


def test_gradient_is_the_derivative_of_the_value() -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(6, 4, dtype=torch.float64)
    parent, target = torch.tensor([0, 1, 2, 2]), torch.tensor([5, 0, 1, 3])
    # Logprobs are fp32, hence the wide step and tolerance.
    assert gradcheck(
        lambda h: next_token_logprobs(h, weight, parent, target, chunk=2)[0], hidden, eps=1e-2, atol=1e-3, rtol=1e-2
    )


def test_without_gradients_nothing_is_kept() -> None:
    with torch.no_grad():
        logprobs, _ = next_token_logprobs(torch.randn(2, 4), torch.randn(9, 4), torch.tensor([0]), torch.tensor([3]))
    assert not logprobs.requires_grad
