import asyncio
import gc
import weakref

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


async def hoard(kept):
    kept.append([[] for _ in range(2_000)])
    return art.Trajectory()


async def test_what_was_gathered_is_not_gone_through_when_the_gathering_ends():
    kept, passes = [], []

    def note(phase, info):
        if phase == "start" and info["generation"] > 0:
            passes.append(len(gc.get_objects(generation=0)) + len(gc.get_objects(generation=1)))

    gc.collect()
    gc.callbacks.append(note)
    try:
        await gather(*(hoard(kept) for _ in range(100)))
        afterwards = [[] for _ in range(10_000)]
    finally:
        gc.callbacks.remove(note)
    assert len(afterwards) == 10_000
    assert passes
    assert max(passes) < 50_000


async def test_what_a_user_has_frozen_stays_frozen():
    gc.freeze()
    try:
        await gather(look([]))
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


class Cycle:
    def __init__(self):
        self.itself = self


@pytest.mark.slow
async def test_what_gatherings_leave_in_cycles_goes_too(monkeypatch):
    monkeypatch.setattr("art.collector.YOUNG_PASSES_BEFORE_A_FULL_ONE", 20)
    left, kept = [], []

    async def leave():
        cycle = Cycle()
        left.append(weakref.ref(cycle))
        return await hoard(kept)  # the cycle is no longer young when it is let go

    gc.collect()
    for _ in range(3):
        await gather(*(leave() for _ in range(100)))
    assert len(left) == 300
    assert sum(cycle() is not None for cycle in left) <= 100
