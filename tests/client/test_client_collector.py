import asyncio
import gc

import pytest

import art
from art.collector import RELAXED


@pytest.fixture(autouse=True)
def thresholds():
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


async def look(seen, wait=0):
    for _ in range(wait):
        await asyncio.sleep(0)
    seen.append(gc.get_threshold())
    return art.Trajectory()


def gather(*rollouts):
    return art.gather_trajectory_groups([art.TrajectoryGroup(rollouts)], pbar_desc=None)


async def test_collections_are_fewer_while_gathering_and_as_before_after():
    seen = []
    await gather(look(seen))
    assert seen == [RELAXED]
    assert gc.get_threshold() == (700, 10, 10)


async def test_gatherings_at_once_and_failing_ones():
    async def fail():
        raise ValueError

    seen = []
    outcomes = await asyncio.gather(gather(look(seen, 50)), gather(fail()), gather(look(seen)), return_exceptions=True)
    assert isinstance(outcomes[1], art.RolloutsFailed)
    assert seen == [RELAXED, RELAXED]
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize("own", [(0, 10, 10), (100_000, 10, 10)])
async def test_a_users_own_settings_stay(own):
    gc.set_threshold(*own)
    seen = []
    await gather(look(seen))
    assert seen == [own]
    assert gc.get_threshold() == own
