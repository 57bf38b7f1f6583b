"""Checkpoints of LocalBackend: which are loaded, held, deleted, forked, pulled, and what a damaged one costs.

On fake engines that are real processes.
"""

import asyncio
import warnings

import pytest
from openai import NotFoundError

from art_core.errors import (
    CheckpointError,
    CheckpointInUse,
    CheckpointNotFound,
    PublicationFailed,
)

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.slow
async def test_a_step_that_is_only_on_disk_is_loaded_when_asked_for(backend, policy, groups, client, said_by_engine):
    asked = client(await backend.register(policy))
    for _ in range(5):
        await backend.train(policy, groups, learning_rate=0.5)
    await said_by_engine(backend.path, "inference", f"unloading {policy.project}/m@1\n")
    assert await asked.served_by("m@1") == ("m@1", -1.5)
    assert (await asked.served_by())[0] == "m@5"


async def test_old_steps_are_unloaded_once_nobody_uses_them(backend, policy, groups, client, said_by_engine):
    asked = client(await backend.register(policy))
    for _ in range(6):
        await backend.train(policy, groups)
        await asked.served_by()
    log = await said_by_engine(backend.path, "inference", f"unloading {policy.project}/m@3\n")
    unloaded = [step for step in range(7) if f"unloading {policy.project}/m@{step}\n" in log]
    assert unloaded == [0, 1, 2, 3]


async def test_a_leased_step_stays_and_cannot_be_deleted(backend, policy, groups, client, recorder):
    asked = client(await backend.register(policy))
    async with backend.lease(policy) as name:
        assert name == "m@0"
        for _ in range(5):
            await backend.train(policy, groups, learning_rate=0.5)
            await asked.served_by()
        assert await asked.served_by(name) == ("m@0", -1.0)
        with pytest.raises(CheckpointInUse, match="0"):
            await backend.delete_checkpoints(policy, [0, 1])
        with pytest.raises(CheckpointInUse):
            await backend.delete_checkpoints(policy, [5])
        assert await backend.list_steps(policy) == [0, 1, 2, 3, 4, 5]
    assert await backend.delete_checkpoints(policy, [0, 1, 4, 77]) == [0, 1, 4]
    assert await backend.list_steps(policy) == [2, 3, 5]
    assert [call for call in recorder.calls if call[0] == "deleted"] == [("deleted", s) for s in (0, 1, 4)]
    with pytest.raises(NotFoundError):
        await asked.chat.completions.create(model="m@1", messages=MESSAGES)
    with pytest.raises(CheckpointNotFound, match="2, 3, 5"):
        async with backend.lease(policy, 4):
            pass


async def test_a_step_that_is_being_deleted_is_nobodys_any_more(
    backend, policy, groups, client, fake_engines, said_by_engine
):
    asked = client(await backend.register(policy))
    for _ in range(5):
        await backend.train(policy, groups, learning_rate=0.5)
    loaded = f"loading {policy.project}/m@1\n"
    log = await said_by_engine(backend.path, "inference", f"un{loaded}")
    fake_engines(hold_load=True)
    # Whoever loads keeps others from changing what the engine holds, so the deletion below has to wait.
    loading = asyncio.create_task(asked.served_by("m@1"))
    await said_by_engine(backend.path, "inference", loaded, times=log.count(loaded) + 1)
    deleting = asyncio.create_task(backend.delete_checkpoints(policy, [4, 0]))
    async with asyncio.timeout(30):
        while "m@4" in [card.id async for card in asked.models.list()]:
            await asyncio.sleep(0.01)
    with pytest.raises(CheckpointNotFound):
        async with backend.lease(policy, 4):
            pass
    with pytest.raises(NotFoundError):
        await asked.chat.completions.create(model="m@4", messages=MESSAGES)
    fake_engines()
    assert await deleting == [0, 4]
    assert await loading == ("m@1", -1.5)
    assert await backend.list_steps(policy) == [1, 2, 3, 5]


@pytest.mark.slow
async def test_the_engine_being_full_of_leased_steps_is_an_error_that_says_so(
    fake_engines, new_backend, policy, groups, tmp_path
):
    async with new_backend(tmp_path / "full", max_adapters=2) as backend:
        await backend.register(policy)
        async with backend.lease(policy, 0):
            await backend.train(policy, groups)
            with pytest.raises(PublicationFailed, match="all 2 places are taken"):
                await backend.train(policy, groups)
            assert await backend.get_step(policy) == 1
        # The step is on disk; it is published before the next one is trained.
        result = await backend.train(policy, groups)
        assert (result.step, await backend.list_steps(policy)) == (3, [0, 1, 2, 3])


async def test_a_step_that_is_not_to_be_kept_goes_when_the_next_is_served(backend, policy, groups, recorder):
    await backend.register(policy)
    result = await backend.train(policy, groups, save_checkpoint=False)
    assert result.checkpoint_path is None
    assert await backend.list_steps(policy) == [0, 1]
    await backend.train(policy, groups)
    assert await backend.list_steps(policy) == [0, 2]
    assert ("deleted", 1) in recorder.calls


async def test_fork_brings_the_optimizer_and_pull_gives_a_peft_folder(backend, make_policy, groups, client, tmp_path):
    old, new = make_policy("old"), make_policy("new")
    await backend.register(old)
    for _ in range(3):
        await backend.train(old, groups, learning_rate=1.0)
    with pytest.raises(CheckpointNotFound, match="nobody"):
        await backend.fork_checkpoint(new, "nobody")
    assert await backend._experimental_fork_checkpoint(new, "old", not_after_step=2) == 2
    asked = client(await backend.register(new))
    # Steps of 1, 2 and, with the optimizer's counter at 2, another 3.
    assert await asked.served_by("new") == ("new@2", -4.0)
    await backend.train(new, groups, learning_rate=1.0)
    assert await asked.served_by("new") == ("new@3", -7.0)
    with pytest.raises(CheckpointError, match="already"):
        await backend.fork_checkpoint(new, "old")
    pulled = await backend.pull_checkpoint(new, step="latest", local_path=tmp_path / "out" / "adapter")
    assert sorted(file.name for file in pulled.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (await backend._experimental_pull_model_checkpoint(new)).name == "0003"
    with pytest.raises(FileExistsError):
        await backend.pull_checkpoint(new, local_path=pulled)
    with pytest.raises(CheckpointNotFound, match="2, 3"):
        await backend.pull_checkpoint(new, step=9)


async def test_a_forked_step_is_served_at_once_by_a_registered_model(backend, make_policy, groups, client):
    old, new = make_policy("old"), make_policy("new")
    asked = client(await backend.register(old))
    await backend.register(new)
    await backend.train(old, groups, learning_rate=1.0)
    assert await backend.fork_checkpoint(new, "old") == 1
    assert await asked.served_by("new") == ("new@1", -2.0)
    assert backend.inference_name(new) == "new@1"


@pytest.mark.slow
async def test_a_corrupt_checkpoint_is_named_and_the_last_good_one_used(
    policy, groups, client, fake_engines, new_backend, tmp_path, checkpoints
):
    async with new_backend(tmp_path / "art") as backend:
        await backend.register(policy)
        for _ in range(3):
            await backend.train(policy, groups, learning_rate=0.5)
    there = checkpoints(backend)
    with (there / "0003/adapter_model.safetensors").open("r+b") as file:
        file.truncate(100)
    content = bytearray((there / "0002/adapter_model.safetensors").read_bytes())
    content[-1] ^= 0xFF
    (there / "0002/adapter_model.safetensors").write_bytes(content)
    async with new_backend(backend.path) as again:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            asked = client(await again.register(policy))
        assert await asked.served_by() == ("m@1", -1.5)
        said = " ".join(str(w.message) for w in warned)
        assert "0003 is not a whole checkpoint" in said
        assert "m@2 was not published" in said
        result = await again.train(policy, groups, learning_rate=0.5)
        assert (result.step, await asked.served_by()) == (2, ("m@2", -2.5))
        assert (there / "0003").exists()
