"""A training step cancelled at every await of its client, and at every moment of its host: told of once, nothing held,
nothing left that would be published by itself, and the next step goes through.
"""

import asyncio

import pytest

from art_core import TrainResult, hookimpl, installed_plugins

pytestmark = pytest.mark.slow
STEP = [
    "art_before_train", "art_checkpoint_saved", "art_before_publish_checkpoint", "art_checkpoint_published",
    "art_after_train",
]  # fmt: skip
ENDS = {"art_after_train", "art_train_failed"}
PUBLISH_ENDS = {"art_checkpoint_published", "art_checkpoint_publish_failed"}


class Heard:
    """A plugin that writes down the hooks of a step."""

    art_api = 1

    def __init__(self):
        self.calls = []

    @hookimpl
    def art_before_train(self):
        self.calls.append("art_before_train")

    @hookimpl
    def art_checkpoint_saved(self):
        self.calls.append("art_checkpoint_saved")

    @hookimpl
    async def art_before_publish_checkpoint(self):
        self.calls.append("art_before_publish_checkpoint")
        await asyncio.sleep(0)

    @hookimpl
    def art_checkpoint_published(self):
        self.calls.append("art_checkpoint_published")

    @hookimpl
    def art_checkpoint_publish_failed(self):
        self.calls.append("art_checkpoint_publish_failed")

    @hookimpl
    def art_after_train(self):
        self.calls.append("art_after_train")

    @hookimpl
    async def art_train_failed(self):
        self.calls.append("art_train_failed")
        await asyncio.sleep(0)


@pytest.fixture
def heard():
    plugin = Heard()
    installed_plugins().register(plugin, "heard")
    yield plugin
    installed_plugins().unregister("heard")


class CancelledAtAwait:
    """Awaits `work`, and cancels the task that does so when it waits for the `turn`th time."""

    def __init__(self, work, turn):
        self.work, self.turn, self.waits = work, turn, 0

    def __await__(self):
        steps = self.work.__await__()
        sent, error = None, None
        while True:
            try:
                waited_for = steps.send(sent) if error is None else steps.throw(error)
            except StopIteration as stop:
                return stop.value
            if self.waits == self.turn:
                asyncio.current_task().cancel()
            self.waits += 1
            sent = error = None
            try:
                sent = yield waited_for
            except BaseException as raised:
                error = raised


async def run(awaitable):
    return await awaitable


def assert_told_once(calls):
    for name in set(calls):
        assert calls.count(name) == 1, calls
    if not calls:
        return  # cancelled before the step was begun
    assert len(ENDS & set(calls)) == 1, calls
    assert len(PUBLISH_ENDS & set(calls)) == ("art_checkpoint_saved" in calls), calls
    assert ("art_after_train" in calls) == ("art_checkpoint_published" in calls), calls


async def the_next_step_goes_through(backend, policy, groups, checkpoints, heard, outcome):
    """Gives the step that is served now."""
    assert_told_once(heard.calls)
    served = await backend.get_step(policy)
    worked = "art_after_train" in heard.calls
    assert isinstance(outcome, TrainResult) <= worked
    heard.calls.clear()
    async with asyncio.timeout(60):
        result = await backend.train(policy, groups)
    # A name that an engine held, if only for a moment, is never used again, so a number may be left out.
    assert served < result.step <= served + 2
    assert heard.calls == STEP, "a cancelled step was left for the next one to publish"
    assert (await backend.list_steps(policy))[-1] == result.step == await backend.get_step(policy)
    heard.calls.clear()
    return result.step


async def test_cancelled_at_every_await_of_the_client(backend, policy, groups, checkpoints, heard):
    await backend.register(policy)
    served = 0
    for turn in range(500):
        work = CancelledAtAwait(backend.train(policy, groups), turn)
        (outcome,) = await asyncio.gather(asyncio.create_task(run(work)), return_exceptions=True)
        assert isinstance(outcome, TrainResult | asyncio.CancelledError), outcome
        if work.waits <= turn:
            assert isinstance(outcome, TrainResult)
            break
        now = await the_next_step_goes_through(backend, policy, groups, checkpoints, heard, outcome)
        assert now > served
        served = now
    else:
        pytest.fail("the step never ended")
    assert turn > 7, "hardly anything was cancelled"


async def test_cancelled_at_forty_moments_of_a_step(backend, policy, groups, checkpoints, heard):
    await backend.register(policy)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await backend.train(policy, groups)
    whole_s = loop.time() - began
    heard.calls.clear()
    for moment in range(40):
        task = asyncio.create_task(backend.train(policy, groups))
        await asyncio.sleep(whole_s * 1.2 * moment / 40)
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(outcome, TrainResult | asyncio.CancelledError), outcome
        await the_next_step_goes_through(backend, policy, groups, checkpoints, heard, outcome)
