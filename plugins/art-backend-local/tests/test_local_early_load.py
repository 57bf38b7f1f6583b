"""A step's adapter is loaded while its checkpoint is still being written: nobody is served by it before it is verified,
and whatever becomes of the step, the engine holds nothing that is not served.
"""

import asyncio
import re

import pytest
from openai import NotFoundError

from art_conformance.spoiled import not_a_number, other_weights
from art_core import hookimpl, installed_plugins
from art_core.errors import PublicationFailed


@pytest.fixture
def tell(fake_engines):
    """Give orders beside the one to tell of the adapter once it is written."""

    def give(**wanted):
        fake_engines(tell_written=True, **wanted)

    give()
    return give


def lines(backend, project, words):
    logs = "\n".join(log.read_text() for log in (backend.path / "logs").glob("inference-fake*.log"))
    return re.findall(rf"^{words} {project}/(m@\d+)$", logs, re.MULTILINE)


@pytest.fixture
def begun(backend, policy, groups, tell, said_by_engine):
    """Begin a step, which has its adapter in the engine, asked its canary, and is held before it is saved."""

    async def begin(**orders):
        tell(hold_save=True, **orders)
        step = asyncio.create_task(backend.train(policy, groups, learning_rate=0.5))
        await said_by_engine(backend.path, "inference", f"answered {policy.project}/m@1")
        return step

    return begin


@pytest.mark.slow
async def test_nobody_is_served_by_a_step_that_is_loaded_and_not_yet_saved(
    backend, policy, groups, client, tell, begun
):
    asked = client(await backend.register(policy))
    step = await begun()
    assert not step.done()
    assert await asked.served_by() == ("m@0", -1.0)
    assert (await backend.get_step(policy), await backend.list_steps(policy)) == (0, [0])
    with pytest.raises(NotFoundError):
        await asked.served_by("m@1")
    tell()
    assert (await step).step == 1
    assert await asked.served_by() == ("m@1", -1.5)


async def test_what_was_loaded_and_asked_early_is_not_loaded_and_asked_again(backend, policy, groups, tell, begun):
    await backend.register(policy)
    step = await begun()
    tell()
    await step
    assert lines(backend, policy.project, "loading").count("m@1") == 1
    assert lines(backend, policy.project, "answered").count("m@1") == 1


async def test_an_engine_that_answers_as_the_old_weights_is_found_out_by_what_it_said_early(
    backend, policy, groups, client, tell, checkpoints
):
    asked = client(await backend.register(policy))
    tell(load_stale=str(checkpoints(backend) / "0000"))
    with pytest.raises(PublicationFailed, match="previous adapter") as failure:
        await backend.train(policy, groups, learning_rate=0.01)
    assert failure.value.stage == "verify"
    assert await asked.served_by() == ("m@0", -1.0)
    assert lines(backend, policy.project, "unloading") == ["m@1"]
    tell()
    result = await backend.train(policy, groups, learning_rate=0.5)
    assert (result.step, await asked.served_by()) == (2, ("m@2", -1.5))


async def test_a_diverged_step_reaches_no_engine(backend, policy, groups, client, tell):
    asked = client(await backend.register(policy))
    tell(poison=True)
    with pytest.raises(PublicationFailed, match=r"lora_B.*not finite") as failure:
        await backend.train(policy, groups)
    assert failure.value.stage == "check"
    assert "m@1" not in lines(backend, policy.project, "loading")
    tell()
    result = await backend.train(policy, groups, learning_rate=0.5)
    assert (result.step, await asked.served_by()) == (1, ("m@1", -1.5))


async def test_a_step_that_fails_after_its_adapter_was_loaded_leaves_the_engine_without_it(
    backend, policy, groups, client, tell, begun
):
    asked = client(await backend.register(policy))
    step = await begun(fail_save="the disk is full")
    tell(fail_save="the disk is full")
    with pytest.raises(OSError, match="the disk is full"):
        await step
    tell()
    # The engine held m@1, so that name is not used for other weights.
    result = await backend.train(policy, groups, learning_rate=0.25)
    assert (result.step, await asked.served_by()) == (2, ("m@2", -1.25))
    assert lines(backend, policy.project, "unloading") == ["m@1"]


async def test_a_step_cancelled_after_its_adapter_was_loaded_leaves_the_engine_without_it(
    backend, policy, groups, client, tell, begun
):
    asked = client(await backend.register(policy))
    step = await begun()
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    tell()
    result = await backend.train(policy, groups, learning_rate=0.25)
    assert (result.step, await asked.served_by()) == (2, ("m@2", -1.25))
    assert lines(backend, policy.project, "unloading") == ["m@1"]


async def test_a_step_that_a_plugin_refuses_is_taken_out_of_the_engine(
    backend, policy, groups, client, tell, recorder, begun, checkpoints
):
    asked = client(await backend.register(policy))
    recorder.refuse = "before_publish"
    step = await begun()
    tell()
    with pytest.raises(RuntimeError, match="refused at"):
        await step
    recorder.refuse = ""
    assert await asked.served_by() == ("m@0", -1.0)
    assert lines(backend, policy.project, "unloading") == ["m@1"]
    assert len(list(checkpoints(backend).glob("0001.refused-*"))) == 1
    result = await backend.train(policy, groups, learning_rate=0.25)
    assert (result.step, await asked.served_by()) == (2, ("m@2", -1.25))


@pytest.mark.parametrize("spoil", [not_a_number, other_weights], ids=lambda spoil: spoil.__name__)
async def test_an_adapter_that_was_changed_after_it_was_loaded_is_refused_and_taken_out(
    backend, base, policy, groups, client, tell, begun, spoil
):
    asked = client(await backend.register(policy))

    class Meddler:
        art_api = 1

        @hookimpl
        def art_before_publish_checkpoint(self, checkpoint):
            spoil(checkpoint.path, base)

    installed_plugins().register(Meddler(), "meddler")
    try:
        step = await begun()
        tell()
        with pytest.raises(PublicationFailed, match=r"not finite|changed after its trainer wrote it") as failure:
            await step
    finally:
        installed_plugins().unregister("meddler")
    assert failure.value.stage == "check"
    assert await asked.served_by() == ("m@0", -1.0)
    assert lines(backend, policy.project, "unloading") == ["m@1"]
    result = await backend.train(policy, groups, learning_rate=0.25)
    assert await asked.served_by() == (f"m@{result.step}", -1.25)


async def test_an_engine_that_does_not_load_it_early_is_asked_again_and_its_reason_is_told(
    backend, policy, groups, client, tell
):
    asked = client(await backend.register(policy))
    tell(refuse_load=True)
    with pytest.raises(PublicationFailed, match="ordered to refuse") as failure:
        await backend.train(policy, groups, learning_rate=0.5)
    assert failure.value.stage == "load"
    assert await asked.served_by() == ("m@0", -1.0)
    tell()
    await backend.register(policy)
    assert await asked.served_by() == ("m@1", -1.5)


@pytest.mark.slow
async def test_an_engine_that_takes_turns_with_training_is_not_told_early(
    tell, new_backend, tmp_path, policy, groups, client
):
    async with new_backend(tmp_path / "shared", inference_engine="fake-shared") as backend:
        asked = client(await backend.register(policy))
        await backend.train(policy, groups, learning_rate=0.5)
        assert await asked.served_by() == ("m@1", -1.5)
        log = (backend.path / "logs/inference-fake-shared-base.log").read_text()
        assert log.index("resumed") < log.index(f"loading {policy.project}/m@1")
