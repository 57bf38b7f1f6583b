"""When a step's rollouts are of quite another policy, it is said with the figures; else nothing is."""

from __future__ import annotations

import math

from art_engine_kit.mismatch import FAR_OFF, MEAN, OUTSIDE, far_off


def test_it_is_said_only_where_the_mean_is_far_off() -> None:
    assert not far_off({})
    assert not far_off({MEAN: FAR_OFF, OUTSIDE: 1.0})
    assert not far_off({MEAN: math.nan})
    said = far_off({MEAN: 1.25, OUTSIDE: 0.9})
    assert "1.25 nats" in said
    assert "90%" in said
    assert "truncated_importance_sampling" in said
