"""What users put into trajectories: numbers of any library, and values of a bad kind, which cost one rollout."""

import asyncio
import math
import re
from decimal import Decimal
from fractions import Fraction

import pytest

import art
from art_core import PendingTrajectoryGroup

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")


async def good(reward=1.0):
    await asyncio.sleep(0)
    return art.Trajectory(reward=reward)


def spoilt(field, value):
    async def rollout():
        trajectory = art.Trajectory(reward=5)
        await asyncio.sleep(0)
        if field == "reward":
            trajectory.reward = value
        elif field in ("metrics=", "metadata="):
            setattr(trajectory, field[:-1], {"m": value})
        else:
            getattr(trajectory, field)["m"] = value
        return trajectory

    return rollout


class BadRepr:
    def __repr__(self):
        raise RuntimeError


BAD_NUMBERS = [None, "0.5 points", "timeout", "", [1], {"a": 1}, np.array([1, 2]), torch.tensor([1.0, 2.0]), 1j]
BAD_NUMBERS += [10**400, BadRepr()]
BAD_SCALARS = [[1], {"a": 1}, np.array([1, 2]), b"\xff", BadRepr()]
SPOILT = [(field, value) for field in ("reward", "metrics", "metrics=") for value in BAD_NUMBERS]
SPOILT += [("reward", value) for value in (math.nan, math.inf, "nan", np.float32("-inf"))]
SPOILT += [(field, value) for field in ("metadata", "metadata=") for value in BAD_SCALARS]


@pytest.mark.parametrize(("field", "value"), SPOILT, ids=lambda value: type(value).__name__)
async def test_a_value_of_a_bad_kind_is_one_failed_rollout_that_names_it(field, value):
    rollout = spoilt(field, value)
    (group,) = await art.gather_trajectory_groups(
        [art.TrajectoryGroup([good(1), rollout(), good(2)])], max_exceptions=1, pbar_total_completion_tokens=True
    )
    assert [t.reward for t in group] == [1, 2]
    (error,) = group.exceptions
    assert field.strip("=") in error.message
    if field != "reward":
        assert re.search(r"\bm\b", error.message)
    if isinstance(value, str | float | None) and not isinstance(value, np.generic):
        assert repr(value) in error.message or str(value) in error.message
    first, failed, last = await art.gather_trajectories([good(1), rollout(), good(2)], max_exceptions=1)
    assert (first.reward, last.reward) == (1, 2)
    assert isinstance(failed, ValueError)
    with pytest.raises(art.RolloutsFailed, match="1 rollout raised"):
        await art.gather_trajectories([good(1), rollout()], pbar_desc=None)


async def test_a_trajectory_among_awaitables_is_read_like_theirs():
    bad = art.Trajectory()
    bad.metrics["m"] = None
    pending = art.TrajectoryGroup([good(), bad, 5])
    assert isinstance(pending, PendingTrajectoryGroup)
    group = await pending
    assert (len(group), [error.type for error in group.exceptions]) == (1, ["InvalidTrajectory", "TypeError"])


async def test_finished_groups_are_held_to_the_same():
    bad = art.Trajectory(reward=2)
    bad.metrics["m"] = "timeout"
    finished = art.TrajectoryGroup(
        [art.Trajectory(reward=1), bad],
        exceptions=[ValueError("before")],
        metadata={"a": 1},
        metrics={"b": 2},
        logs=["c"],
    )

    async def later():
        return finished

    for group in (finished, later()):
        (kept,) = await art.gather_trajectory_groups([group], pbar_desc=None, max_exceptions=2)
        assert [t.reward for t in kept] == [1]
        assert sorted(error.type for error in kept.exceptions) == ["InvalidTrajectory", "ValueError"]
        assert (kept.metadata, kept.metrics, kept.logs) == ({"a": 1}, {"b": 2}, ["c"])
    with pytest.raises(art.RolloutsFailed, match=re.escape("metrics['m'] cannot be kept: 'timeout' is not one number")):
        await art.gather_trajectory_groups([finished], pbar_desc=None, max_exceptions=1)


ONE_NUMBER = [
    (np.float32(0.5), 0.5), (np.float64(0.5), 0.5), (np.float16(0.5), 0.5), (np.int64(3), 3), (np.bool_(True), 1),
    (np.array(0.5), 0.5), (torch.tensor(0.5), 0.5), (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    (torch.tensor(3), 3), (torch.tensor(0.5, requires_grad=True), 0.5), (Decimal("0.5"), 0.5), (Fraction(1, 2), 0.5),
    (True, True), (3, 3), ("0.5", 0.5),
]  # fmt: skip


@pytest.mark.parametrize(("value", "number"), ONE_NUMBER, ids=lambda value: type(value).__name__)
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")
async def test_what_float_takes_as_one_number_is_that_number(value, number):
    async def rollout():
        trajectory = art.Trajectory(metrics={"built": value})
        trajectory.reward = value
        trajectory.metrics["set"] = value
        if not isinstance(value, str):
            trajectory.metadata["set"] = value
        return trajectory

    (trajectory,) = await art.gather_trajectories([rollout()], pbar_desc="bar")
    assert art.Trajectory(reward=value).reward == trajectory.reward == number
    assert type(trajectory.reward) is float
    for kept in (*trajectory.metrics.values(), *trajectory.metadata.values()):
        assert kept == number
        assert type(kept) in (float, int, bool)
    assert art.Trajectory.model_validate_json(trajectory.model_dump_json()) == trajectory


@pytest.mark.parametrize("value", [None, "text", 3, True, 0.5, math.nan, 2**53 + 1])
async def test_a_scalar_stays_what_it_is(value):
    async def rollout():
        trajectory = art.Trajectory(metadata={"built": value})
        trajectory.metadata["set"] = value
        return trajectory

    (trajectory,) = await art.gather_trajectories([rollout()], pbar_desc=None)
    assert [repr(kept) for kept in trajectory.metadata.values()] == [repr(value)] * 2
