from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from art_training_kit.advantages import balance_step, group_advantages

rewards = st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=1, max_size=9)


@settings(deadline=None)
@given(rewards, st.booleans())
def test_group_advantages_against_the_formula(values: list[float], scale: bool) -> None:
    mean = sum(values) / len(values)
    std = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
    expected = [(v - mean) / ((std + 1e-6) if scale else 1) for v in values]
    if len(set(values)) == 1:
        expected = [0.0] * len(values)
    np.testing.assert_allclose(group_advantages(np.array(values), scale=scale), expected, rtol=1e-6, atol=1e-9)


def test_equal_rewards_are_exactly_zero_although_their_mean_is_not() -> None:
    assert not group_advantages(np.array([0.1] * 3), scale=True).any()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-3, 3).filter(lambda a: abs(a) > 1e-3), st.integers(1, 30)), min_size=1, max_size=12),
    st.floats(-0.9, 0.9),
)
def test_balance_against_token_by_token(data: list[tuple[float, int]], balance: float) -> None:
    advantages, tokens = (np.array(x) for x in zip(*data, strict=True))
    a, w = balance_step(advantages, tokens, balance)
    each_w = np.concatenate([np.full(n, 1 / n) for n in tokens])
    each_a = np.concatenate([np.full(n, x) for x, n in zip(advantages, tokens, strict=True)])
    each_w /= each_w.mean()
    if balance > 0:
        each_a = np.where(each_a > 0, each_a, each_a * (1 - balance))
    elif balance < 0:
        each_a = np.where(each_a < 0, each_a, each_a * (1 + balance))
    each_a /= (np.abs(each_a) * each_w).mean()
    np.testing.assert_allclose(np.repeat(a, tokens), each_a, rtol=1e-9)
    np.testing.assert_allclose(np.repeat(w, tokens), each_w, rtol=1e-9)


def test_full_balance_keeps_one_sign_and_a_value_outside_is_refused() -> None:
    a, _ = balance_step(np.array([1.0, -1.0]), np.array([2, 5]), 1.0)
    assert a[0] > 0
    assert a[1] == 0
    with pytest.raises(ValueError, match="advantage_balance"):
        balance_step(np.array([1.0]), np.array([2]), 1.5)
