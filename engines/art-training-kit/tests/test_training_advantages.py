from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from art_training_kit.advantages import balance_step, differ, group_advantages

rewards = st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=1, max_size=9)


@given(rewards, st.booleans())
def test_group_advantages_against_the_formula(values: list[float], scale: bool) -> None:
    mean = sum(values) / len(values)
    std = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
    expected = [(v - mean) / ((std + 1e-6) if scale else 1) for v in values]
    if max(values) - min(values) <= 1e-12 * max(1.0, *map(abs, values)):
        expected = [0.0] * len(values)
    np.testing.assert_allclose(group_advantages(np.array(values), scale=scale), expected, rtol=1e-6, atol=1e-9)


def test_equal_rewards_are_exactly_zero_although_their_mean_is_not() -> None:
    assert not group_advantages(np.array([0.1] * 3), scale=True).any()


SAME = {
    "a sum and its result": [0.3, 0.1 + 0.2],
    "around nothing": [0.0, 0.1 + 0.2 - 0.3],
    "zeros of both signs": [0.0, -0.0],
    "the smallest numbers": [5e-324, 0.0, 1e-308],
    "a thousand tenths": [100.0, sum([0.1] * 1000)],
    "large ones": [1e15 / 3, 1e15 / 3 + 0.0625],
    "the largest": [1e150, np.nextafter(1e150, 0)],
    "negative ones": [-0.7, -(0.1 + 0.6), -0.7],
    "one": [3.0],
    "none": [],
}
OTHER = {
    "ordinary": [0.0, 1.0],
    "a millionth": [0.5, 0.500001],
    "a billionth": [1.0, 1.000000001],
    "one in a billion": [1e9, 1e9 + 1],
    "beyond float32": [1e100, 2e100],
    "the largest": [-1e150, 1e150],
    "one of many": [0.1] * 99 + [0.1 + 1e-9],
}


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("kind", SAME)
def test_a_spread_below_rounding_is_no_spread(kind: str, scale: bool) -> None:
    values = np.array(SAME[kind], dtype=np.float64)
    assert not differ(values)
    np.testing.assert_array_equal(group_advantages(values, scale=scale), np.zeros(len(values)))


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("kind", OTHER)
def test_a_spread_above_it_is_learnt_from_at_any_size(kind: str, scale: bool) -> None:
    values = np.array(OTHER[kind], dtype=np.float64)
    assert differ(values)
    advantages = group_advantages(values, scale=scale)
    assert np.isfinite(advantages).all()
    assert advantages[np.argmax(values)] > 0 > advantages[np.argmin(values)]
    balanced, _ = balance_step(advantages, np.full(len(values), 3), 0.0)
    assert np.isfinite(balanced).all()
    np.testing.assert_allclose(np.abs(balanced).mean(), 1.0)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20), st.randoms(), st.integers(1, 6))
def test_one_sum_in_any_order_is_one_reward(parts: list[float], random: Random, size: int) -> None:
    sums = []
    for _ in range(size):
        random.shuffle(parts)
        sums.append(sum(parts))
    assert not group_advantages(np.array(sums), scale=True).any()


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
