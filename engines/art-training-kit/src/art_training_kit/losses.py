"""The policy losses: pure functions from logprobs to a loss, nothing else.

They work on entries, one for each sampled token of each sequence, flat and in any order, so they know neither packing
nor models. The options are `TrainOptions` as they are, where a sentence says what each does; the formulas and defaults
are those of the ART contract.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from art_engine_kit.train_options import ImportanceLevel, TrainOptions


@dataclass(frozen=True, slots=True)
class Entries:
    """Sampled tokens, all tensors of shape [E].

    `old_logprobs`: under the policy that sampled them, or as recalculated before the step; NaN is taken as equal to
    the new one. `advantages` and `weights` are normalized over the step. `sequence` numbers the sequences from 0.
    `sampled_logprobs`, when old ones were recalculated, are what the engine reported; `reference_logprobs` belong to
    the KL reference policy.
    """

    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    sequence: Tensor
    sampled_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over entries; divide by `count` for means. Only `loss` carries a gradient.

    `kl_div` sums the estimator ρ - 1 - log ρ of the divergence between the sampling policy and the present one,
    `kl_policy_ref` new - reference (None without a reference).
    """

    loss: Tensor
    kl_div: Tensor
    kl_policy_ref: Tensor | None
    count: int


def clip_range(options: TrainOptions) -> tuple[float, float]:
    """(1 - ε, 1 + ε_high) with the loss's own defaults filled in: 1 and 4 for CISPO; 0.2 for both in PPO, where a given
    ε alone is the upper bound's too.
    """
    if options.loss_fn == "ppo":
        low = 0.2 if options.epsilon is None else options.epsilon
        high = low if options.epsilon_high is None else options.epsilon_high
    else:
        low = 1.0 if options.epsilon is None else options.epsilon
        high = 4.0 if options.epsilon_high is None else options.epsilon_high
    return 1.0 - low, 1.0 + high


def policy_loss(new_logprobs: Tensor, entries: Entries, options: TrainOptions) -> LossSums:
    """Σ loss·w over entries, of which every one is a trained token; the mean is this over their number.

    CISPO is -clip(sg ρ, 1-ε, 1+ε_high) A log π; PPO is -min(ρA, clip(ρ, 1-ε, 1+ε_high) A). `new_logprobs` has shape [E]
    and carries the gradient.
    """
    new = new_logprobs
    fixed = new.detach()
    old = torch.where(entries.old_logprobs.isnan(), fixed, entries.old_logprobs)
    difference = new - old
    ratio = _ratio(difference, entries.sequence, options.importance_sampling_level)
    low, high = clip_range(options)
    advantages = entries.advantages
    cap = options.max_negative_advantage_importance_sampling_weight
    if cap is not None:
        ratio = torch.where(advantages < 0, ratio.clamp(max=cap), ratio)
    if options.mask_prob_ratio:
        ratio = torch.where((ratio > low) & (ratio < high), ratio, torch.zeros_like(ratio))
    if options.kimi_k2_tau is not None:
        advantages = advantages - options.kimi_k2_tau * difference.detach()
    kl_policy_ref: Tensor | None = None
    if entries.reference_logprobs is not None:
        kl = fixed - entries.reference_logprobs
        kl_policy_ref = kl.sum()
        advantages = advantages + options.kl_penalty_coef * (kl.mean() - kl)
    if options.loss_fn == "ppo":
        loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    else:
        loss = -ratio.detach().clamp(low, high) * advantages * new
    bound = options.truncated_importance_sampling
    if bound is not None:
        loss = loss * _mismatch(ratio, old, fixed, entries).clamp(max=bound)
    divergence = (difference.exp() - 1.0 - difference).detach()
    return LossSums((loss * entries.weights).sum(), divergence.sum(), kl_policy_ref, new.numel())


def _ratio(difference: Tensor, sequence: Tensor, level: ImportanceLevel) -> Tensor:
    if level == "token":
        return difference.exp()
    sequences = int(sequence.max()) + 1
    total = difference.new_zeros(sequences).index_add(0, sequence, difference)
    length = difference.new_zeros(sequences).index_add(0, sequence, torch.ones_like(difference))
    mean = (total / length.clamp(min=1))[sequence]
    if level == "sequence":
        return mean.exp()
    if level == "average":
        return (difference.exp() + mean.exp()) / 2
    return ((difference + mean) / 2).exp()


def _mismatch(ratio: Tensor, old: Tensor, fixed: Tensor, entries: Entries) -> Tensor:
    """The ratio that truncated importance sampling bounds: trainer against engine where old logprobs were
    recalculated.
    """
    if entries.sampled_logprobs is None:
        return ratio.detach()
    sampled = torch.where(entries.sampled_logprobs.isnan(), fixed, entries.sampled_logprobs)
    return (old - sampled).exp()
