"""LocalBackend with a worker of two ranks: it trains, one rank's end is told in words, and the next step works."""

import asyncio
import os
import time

import pytest

from art_backend_local import LocalBackend
from art_conformance.tiny_model import write_base_model
from art_core import Trajectory, TrajectoryGroup
from art_core.errors import TrainingFailed

pytest.importorskip("art_engine_torch")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MESSAGES = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base_model(tmp_path_factory.mktemp("base") / "tiny")


async def gather(client):
    async def attempt(number):
        answer = await client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=8, seed=number)
        return Trajectory(messages_and_choices=[*MESSAGES, answer.choices[0]], reward=float(number % 4))

    return [TrajectoryGroup(await asyncio.gather(*(attempt(4 * group + i) for i in range(4)))) for group in range(2)]


async def test_a_rank_that_ends_is_named_and_the_next_step_has_a_new_worker(
    tmp_path, base, make_policy, client, programs, capsys
):
    options = {"inference_engine": "torch", "training_engine": "torch", "show_progress": False}
    policy = make_policy(config={"init_args": {"ranks": 2}})
    async with LocalBackend(path=tmp_path / "art", in_process=True, **options) as backend:
        asked = client(await backend.register(policy))

        def ranks():
            found = programs(os.getpid(), "art_training_kit.worker")
            return sorted(found, key=lambda each: each.create_time())

        first = await backend.train(policy, await gather(asked), learning_rate=1e-3)
        assert (first.step, first.metrics["data/step_num_gradient_steps"]) == (1, 1.0)
        assert len(ranks()) == 2

        # In the midst of a step: the other rank waits for it.
        ranks()[1].suspend()
        groups = await gather(asked)
        step = asyncio.create_task(backend.train(policy, groups, learning_rate=1e-3))
        await asyncio.sleep(2)
        assert not step.done()
        victim = ranks()[1]
        killed = time.monotonic()
        victim.kill()
        with pytest.raises(TrainingFailed, match=rf"rank 1 of 2 \(process {victim.pid}\) was ended by signal 9"):
            await asyncio.wait_for(step, 30)
        with capsys.disabled():
            print(f"\na killed rank's step failed after {time.monotonic() - killed:.1f} s")
        assert (await backend.train(policy, groups, learning_rate=1e-3)).step == 2

        # Between two steps.
        ranks()[1].kill()
        async with asyncio.timeout(30):
            while ranks():
                await asyncio.sleep(0.05)
        assert (await backend.train(policy, await gather(asked), learning_rate=1e-3)).step == 3
    assert ranks() == []
