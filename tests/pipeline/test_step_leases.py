"""The steps that a pipeline holds: one lease of the backend for each, from its first holder to its last."""

import asyncio

import pytest

from art.pipeline_trainer.step_leases import StepLeases
from art_core.errors import CheckpointNotFound


async def test_a_lease_lasts_from_the_first_holder_to_the_last(model, simulated):
    leases = StepLeases(model, simulated)
    for _ in range(2):
        async with leases.hold(0) as name:
            async with leases.hold(0) as same:
                assert name == same == f"{model.name}@0"
                assert simulated.leases[0] == 1
            assert leases.steps == {0}
            assert simulated.leases[0] == 1
        assert leases.steps == frozenset()
        assert simulated.leases[0] == 0


async def test_holders_that_come_and_go_in_any_order_share_it(model, simulated):
    leases = StepLeases(model, simulated)
    left = [asyncio.Event() for _ in range(4)]

    async def holder(leave):
        async with leases.hold(0):
            await leave.wait()

    holders = [asyncio.create_task(holder(leave)) for leave in left]
    await asyncio.sleep(0)
    for number in (2, 0, 3):
        left[number].set()
        await holders[number]
        assert simulated.leases[0] == simulated.most_leases == 1
    holders[1].cancel()
    await asyncio.gather(*holders, return_exceptions=True)
    assert simulated.leases[0] == 0


async def test_a_step_that_cannot_be_leased_is_not_held(model, simulated):
    leases = StepLeases(model, simulated)
    with pytest.raises(CheckpointNotFound):
        async with leases.hold(7):
            raise AssertionError("nobody holds it")
    assert leases.steps == frozenset()
