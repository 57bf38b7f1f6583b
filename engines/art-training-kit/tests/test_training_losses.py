"""Each option against an oracle written in numpy from the contract's formulas, token by token."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from art_engine_kit.train_options import TrainOptions
from art_training_kit.losses import Entries, clip_range, policy_loss


def oracle(new: Any, old: Any, a: Any, w: Any, seq: Any, sampled: Any, ref: Any, o: TrainOptions) -> tuple[float, Any]:
    """Σ loss·w and its derivative towards each new logprob."""
    n = len(new)
    old = [new[i] if math.isnan(old[i]) else old[i] for i in range(n)]
    diff = [new[i] - old[i] for i in range(n)]
    members = {s: [i for i in range(n) if seq[i] == s] for s in set(seq)}
    ppo = o.loss_fn == "ppo"
    eps = o.epsilon if o.epsilon is not None else (0.2 if ppo else 1.0)
    high = o.epsilon_high if o.epsilon_high is not None else (eps if ppo else 4.0)
    kls = None if ref is None else [new[i] - ref[i] for i in range(n)]
    total, slope = 0.0, np.zeros(n)
    for i in range(n):
        group = members[seq[i]]
        mean = sum(diff[j] for j in group) / len(group)
        token, whole = math.exp(diff[i]), math.exp(mean)
        # dρ/d new_j, for every j of the sequence.
        d_token = {i: token}
        d_whole = {j: whole / len(group) for j in group}
        if o.importance_sampling_level == "token":
            rho, d_rho = token, d_token
        elif o.importance_sampling_level == "sequence":
            rho, d_rho = whole, d_whole
        elif o.importance_sampling_level == "average":
            rho = (token + whole) / 2
            d_rho = {j: (d_token.get(j, 0) + d_whole[j]) / 2 for j in group}
        else:
            rho = math.sqrt(token) * math.sqrt(whole)
            d_rho = {j: rho / 2 * (d_token.get(j, 0) / token + d_whole[j] / whole) for j in group}
        cap = o.max_negative_advantage_importance_sampling_weight
        if cap is not None and a[i] < 0 and rho > cap:
            rho, d_rho = cap, {}
        if o.mask_prob_ratio and not 1 - eps < rho < 1 + high:
            rho, d_rho = 0.0, {}
        adv = a[i]
        if o.kimi_k2_tau is not None:
            adv -= o.kimi_k2_tau * diff[i]
        if kls is not None:
            adv += o.kl_penalty_coef * (sum(kls) / n - kls[i])
        clipped = min(max(rho, 1 - eps), 1 + high)
        factor = 1.0
        if o.truncated_importance_sampling is not None:
            engine = None if sampled is None else new[i] if math.isnan(sampled[i]) else sampled[i]
            mismatch = rho if engine is None else math.exp(old[i] - engine)
            factor = min(mismatch, o.truncated_importance_sampling)
        if ppo:
            total += -min(rho * adv, clipped * adv) * factor * w[i]
            if rho * adv <= clipped * adv:
                for j, d in d_rho.items():
                    slope[j] -= d * adv * factor * w[i]
        else:
            total += -clipped * adv * new[i] * factor * w[i]
            slope[i] -= clipped * adv * factor * w[i]
    return total, slope


@st.composite
def cases(draw: st.DrawFn) -> Any:
    n = draw(st.integers(1, 12))
    f = lambda lo, hi: st.lists(st.floats(lo, hi).map(lambda x: round(x, 3)), min_size=n, max_size=n)  # noqa: E731
    new, old, a, w = draw(f(-6, -0.01)), draw(f(-6, -0.01)), draw(f(-2, 2)), draw(f(0.1, 2))
    holes = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    old = [math.nan if hole else x + 0.0007 for x, hole in zip(old, holes, strict=True)]
    seq = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    sampled = draw(st.none() | f(-6, -0.01))
    ref = draw(st.none() | f(-6, -0.01))
    options = TrainOptions(
        loss_fn=draw(st.sampled_from(["cispo", "ppo"])),
        epsilon=draw(st.none() | st.floats(0.05, 1)),
        epsilon_high=draw(st.none() | st.floats(0.05, 5)),
        importance_sampling_level=draw(st.sampled_from(["token", "sequence", "average", "geometric_average"])),
        max_negative_advantage_importance_sampling_weight=draw(st.none() | st.floats(0.3, 3)),
        mask_prob_ratio=draw(st.booleans()),
        kimi_k2_tau=draw(st.none() | st.floats(0.01, 1)),
        kl_penalty_coef=draw(st.floats(0, 1)),
        truncated_importance_sampling=draw(st.none() | st.floats(0.5, 3)),
    )
    return new, old, a, w, seq, sampled, ref, options


@pytest.mark.slow
@settings(max_examples=200)
@given(cases())
def test_every_option_against_the_oracle(case: Any) -> None:
    new, old, a, w, seq, sampled, ref, options = case
    expected, slope = oracle(new, old, a, w, seq, sampled, ref, options)
    t = lambda x: None if x is None else torch.tensor(x, dtype=torch.float64)  # noqa: E731
    x = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    entries = Entries(t(old), t(a), t(w), torch.tensor(seq), t(sampled), t(ref))
    sums = policy_loss(x, entries, options)
    sums.loss.backward()
    assert float(sums.loss.detach()) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(x.grad.numpy(), slope, rtol=1e-7, atol=1e-9)
    if ref is not None:
        assert float(sums.kl_policy_ref) == pytest.approx(sum(n - r for n, r in zip(new, ref, strict=True)), abs=1e-9)


def entries(**changes: Any) -> Entries:
    plain = Entries(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, -1.0]), torch.ones(2), torch.tensor([0, 1]))
    return replace(plain, **changes)


def test_on_policy_divergence_is_zero_and_missing_old_logprobs_count_as_on_policy() -> None:
    new = torch.tensor([-1.0, -2.0], requires_grad=True)
    known = policy_loss(new, entries(), TrainOptions())
    unknown = policy_loss(new, entries(old_logprobs=torch.full((2,), math.nan)), TrainOptions())
    assert float(known.kl_div) == 0
    assert torch.equal(known.loss, unknown.loss)


def test_identical_reference_gives_kl_zero() -> None:
    new = torch.tensor([-1.0, -2.0], requires_grad=True)
    sums = policy_loss(new, entries(reference_logprobs=new.detach().clone()), TrainOptions(kl_penalty_coef=0.5))
    assert abs(float(sums.kl_policy_ref)) < 1e-6


def test_the_cap_touches_negative_advantages_only() -> None:
    new, options = (
        torch.zeros(2, requires_grad=True),
        TrainOptions(max_negative_advantage_importance_sampling_weight=0.5),
    )
    old = torch.full((2,), -1.0)
    (slope,) = torch.autograd.grad(policy_loss(new, entries(old_logprobs=old), options).loss, new)
    np.testing.assert_allclose(slope.numpy(), [-math.e, 0.5], rtol=1e-6)


def test_default_clip_ranges() -> None:
    assert clip_range(TrainOptions()) == (0.0, 5.0)
    assert clip_range(TrainOptions(loss_fn="ppo")) == (0.8, 1.2)
    assert clip_range(TrainOptions(loss_fn="ppo", epsilon=0.1)) == (0.9, 1.1)
    assert clip_range(TrainOptions(epsilon_high=2.0)) == (0.0, 3.0)
