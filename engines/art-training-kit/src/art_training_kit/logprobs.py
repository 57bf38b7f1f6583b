"""Logprobs of chosen next tokens from hidden states, a chunk of positions at a time.

The tokens x vocabulary matrix is never held. The gradient of log p(t) towards the hidden state is W[t] - Σ p(v) W[v];
that expectation is taken while a chunk's probabilities are at hand, so backward needs neither the logits nor a second
pass. Knows no model: it takes hidden states and the frozen output matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_BYTES = 64 << 20


def next_token_logprobs(
    hidden: Tensor, weight: Tensor, target_parent: Tensor, targets: Tensor, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [T] of `targets`, and the entropies [U] of the U distributions, in nats, fp32.

    `hidden` is [U, H], one row for each position whose next-token distribution is needed; `weight` is the output
    matrix [V, H] and gets no gradient; `target_parent` [T] says which row of `hidden` predicts each target. Entropies
    carry no gradient. `chunk` is the number of positions a time; by default as many as keep the logits near 64 MiB.
    """
    size = chunk or max(16, _CHUNK_BYTES // (4 * weight.shape[0]))
    result: tuple[Tensor, Tensor] = _NextTokenLogprobs.apply(hidden, weight, target_parent, targets, size)  # type: ignore[no-untyped-call]
    return result


class _NextTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target_parent: Tensor, targets: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        positions = hidden.shape[0]
        needs_gradient = hidden.requires_grad
        chosen = torch.empty(targets.shape[0], dtype=torch.float32, device=hidden.device)
        log_total = torch.empty(positions, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(log_total)
        expected = torch.empty_like(hidden) if needs_gradient else None
        for start in range(0, positions, chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.T).float()
            here = ((target_parent >= start) & (target_parent < start + chunk)).nonzero().squeeze(1)
            chosen[here] = logits[target_parent[here] - start, targets[here]]
            total = torch.logsumexp(logits, -1)
            log_total[part] = total
            probabilities = torch.exp(logits - total[:, None])
            entropy[part] = total - torch.linalg.vecdot(probabilities, logits)
            if expected is not None:
                expected[part] = probabilities.to(weight.dtype) @ weight
        if expected is not None:
            ctx.save_for_backward(weight, target_parent, targets, expected)
        ctx.mark_non_differentiable(entropy)
        return chosen - log_total[target_parent], entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight, target_parent, targets, expected = ctx.saved_tensors
        per_position = torch.zeros(expected.shape[0], dtype=torch.float32, device=grad.device)
        per_position.index_add_(0, target_parent, grad.float())
        result = expected.float().mul_(-per_position[:, None])
        result.index_add_(0, target_parent, grad.float()[:, None] * weight[targets].float())
        return result.to(expected.dtype), None, None, None, None
