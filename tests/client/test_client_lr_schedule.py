"""Schedules against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest

from art.lr_schedule import create_lr_schedule


def test_linear_falls_from_the_peak_to_the_minimum() -> None:
    assert create_lr_schedule(5, 1.0, min_lr=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_is_half_a_wave() -> None:
    half = 1 / math.sqrt(2)
    expected = [1.0, (1 + half) / 2, 0.5, (1 - half) / 2, 0.0]
    assert create_lr_schedule(5, 1.0, "cosine") == pytest.approx(expected)


def test_constant_stays_at_the_peak_after_its_warm_up() -> None:
    assert create_lr_schedule(5, 3e-4, "constant", warmup_steps=2) == pytest.approx([1.5e-4, 3e-4, 3e-4, 3e-4, 3e-4])


@pytest.mark.parametrize("method", ["linear", "cosine", "constant"])
def test_the_warm_up_rises_evenly_to_the_peak_and_the_rest_begins_there(method: Any) -> None:
    rates = create_lr_schedule(10, 1.0, method, warmup_steps=4, min_lr=0.2)
    assert rates[:4] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    assert rates[4] == 1.0
    assert rates[-1] == pytest.approx(1.0 if method == "constant" else 0.2)


@pytest.mark.parametrize("method", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("steps", "warm_up"), [(1, 0), (1, 1), (3, 2), (3, 3)])
def test_a_schedule_has_a_rate_for_each_step_however_short(method: Any, steps: int, warm_up: int) -> None:
    rates = create_lr_schedule(steps, 1.0, method, warmup_steps=warm_up)
    assert len(rates) == steps
    assert max(rates) == 1.0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"total_steps": 0}, "total_steps"),
        ({"warmup_steps": 6}, "warmup_steps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"min_lr": 2.0}, "min_lr"),
        ({"peak_lr": math.nan}, "peak_lr"),
        ({"method": "step"}, "linear, cosine, constant"),
    ],
)
def test_a_number_out_of_range_is_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        create_lr_schedule(**({"total_steps": 5, "peak_lr": 1.0} | arguments))
