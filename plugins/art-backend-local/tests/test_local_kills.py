"""Clients, engines and workers killed, disks full: what LocalBackend keeps, and how it goes on. On the fake engines."""

import asyncio
import os
import resource
import warnings

import pytest
from openai import APIStatusError

from art_backend_local.wire.host_files import read_host
from art_core.errors import CheckpointInUse, ProcessFailed, TrainingFailed
from art_engine_kit.checkpoint_folder import whole_steps
from art_runtime.process_identity import process_lives

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


async def test_everything_ends_with_a_client_that_is_killed(run_client, tmp_path, until):
    process = run_client(tmp_path / "art")
    process.said("registered")
    below = process.below()
    assert len(below) >= 3
    process.kill_and_wait()
    await until(lambda: not any(process_lives(pid, identity) for pid, identity in below))
    assert not (tmp_path / "art/host.json").exists()


async def test_a_killed_engine_comes_back_with_the_right_steps(
    backend, policy, groups, client, fake_engines, said_by_engine, program
):
    asked = client(await backend.register(policy))
    await backend.train(policy, groups, learning_rate=0.5)
    async with backend.lease(policy, 0):
        host = read_host(backend.path).pid
        engine = program(host, "inference_server")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            fake_engines(hold_answer=True)
            waiting = asyncio.create_task(
                asked.chat.completions.create(model="m", messages=[{"role": "user", "content": "hold"}])
            )
            await said_by_engine(backend.path, "inference", f"holding {policy.project}/m@1")
            fake_engines()
            engine.kill()
            # What was under way is asked again of the restarted engine, under the step that it was routed to.
            assert (await waiting).model == "m@1"
            asked = asked.with_options(max_retries=2)
            answers = await asyncio.gather(*(asked.served_by() for _ in range(5)), asked.served_by("m@0"))
        assert set(answers[:-1]) == {("m@1", -1.5)}
        assert answers[-1] == ("m@0", -1.0)
        said_ = " ".join(str(w.message) for w in warned)
        assert "died and is being restarted" in said_
        assert "answered" in said_, "the end of the engine's log belongs to the report"
        assert program(host, "inference_server").pid != engine.pid
    assert (await backend.train(policy, groups, learning_rate=0.5)).step == 2


async def test_an_engine_that_cannot_start_again_is_reported_with_its_log(
    new_backend, tmp_path, policy, client, fake_engines, program
):
    async with new_backend(tmp_path / "art") as backend:
        asked = client(await backend.register(policy))
        fake_engines(refuse_start=True)
        program(read_host(backend.path).pid, "inference_server").kill()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said_ = ""
            async with asyncio.timeout(60):
                while "ordered not to start" not in said_:
                    with pytest.raises(APIStatusError) as failure:
                        await asked.served_by()
                    assert failure.value.status_code in (502, 503)
                    said_ = str(failure.value)
            with pytest.raises(ProcessFailed, match="ordered not to start"):
                await backend.register(policy)
            fake_engines()
            asked = client(await backend.register(policy))
            assert await asked.served_by() == ("m@0", -1.0)


async def test_a_killed_worker_fails_the_step_and_the_next_one_works(
    backend, policy, groups, fake_engines, client, said_by_engine, program
):
    asked = client(await backend.register(policy))
    fake_engines(crash=True)
    with pytest.raises(TrainingFailed, match="ordered to crash"):
        await backend.train(policy, groups)
    fake_engines(hold_train=True)
    step = asyncio.create_task(backend.train(policy, groups))
    host = read_host(backend.path).pid
    await said_by_engine(backend.path, "training", f"job begun {policy.project}/m@1", times=2)
    program(host, "training_worker").kill()
    with pytest.raises(TrainingFailed, match="SIGKILL"):
        await step
    fake_engines()
    result = await backend.train(policy, groups, learning_rate=0.5)
    assert (result.step, await asked.served_by()) == (1, ("m@1", -1.5))


async def test_a_client_killed_in_the_middle_of_training_keeps_nothing_and_lets_go(
    run_client, tmp_path, new_backend, policy, groups, fake_engines, checkpoints, said_by_engine, ps, end_host
):
    path = tmp_path / "art"
    async with new_backend(path, in_process=False) as backend:
        await backend.register(policy)
        fake_engines(hold_train=True)
        other = run_client(path, "say(training=1); await backend.train(model, groups)", in_process=False)
        other.said("training")
        await said_by_engine(backend.path, "training", f"job begun {policy.project}/m@1")
        assert (await ps(path))["models"][0]["training"]
        other.kill_and_wait()
        async with asyncio.timeout(60):
            while (await ps(path))["models"][0]["training"]:
                continue
        fake_engines()
        assert (await backend.train(policy, groups)).step == 1
        assert list(whole_steps(checkpoints(backend))) == [0, 1]
        await asyncio.to_thread(end_host, path)


async def test_a_client_killed_in_the_middle_of_publishing_leaves_a_step_that_is_served_later(
    run_client, tmp_path, new_backend, policy, client, fake_engines, said_by_engine
):
    path = tmp_path / "art"
    fake_engines(hold_train=True)
    first = run_client(path, "say(begun=1); await backend.train(model, groups, learning_rate=0.5)", in_process=True)
    first.said("begun")
    await said_by_engine(path, "training", f"job begun {policy.project}/m@1")
    fake_engines(hold_load=True)
    await said_by_engine(path, "inference", f"loading {policy.project}/m@1")
    first.kill_and_wait()
    fake_engines()
    async with new_backend(path) as backend:
        assert await client(await backend.register(policy)).served_by() == ("m@1", -1.5)


async def test_a_client_that_dies_frees_its_leases(run_client, tmp_path, new_backend, policy, groups, end_host):
    path = tmp_path / "art"
    async with new_backend(path, in_process=False) as backend:
        await backend.register(policy)
        code = """
            async with backend.lease(model, 0):
                say(leased=1)
                await asyncio.sleep(600)
        """
        other = run_client(path, code, in_process=False)
        other.said("leased")
        await backend.train(policy, groups)
        with pytest.raises(CheckpointInUse):
            await backend.delete_checkpoints(policy, [0])
        other.kill_and_wait()
        async with asyncio.timeout(30):
            while True:
                try:
                    assert await backend.delete_checkpoints(policy, [0]) == [0]
                    break
                except CheckpointInUse:
                    await asyncio.sleep(0.05)
        await asyncio.to_thread(end_host, path)


async def test_a_full_disk_at_saving_is_clear_and_loses_nothing(backend, policy, groups, fake_engines, client):
    asked = client(await backend.register(policy))
    await backend.train(policy, groups, learning_rate=0.5)
    fake_engines(fail="step 2 could not be saved: the disk is full")
    with pytest.raises(OSError, match="the disk is full"):
        await backend.train(policy, groups)
    assert await asked.served_by() == ("m@1", -1.5)
    fake_engines()
    assert (await backend.train(policy, groups)).step == 2


async def test_a_full_disk_at_writing_the_trajectories_is_clear(backend, policy, groups, client, checkpoints):
    asked = client(await backend.register(policy))
    jobs = checkpoints(backend).parent / "jobs"
    jobs.mkdir(exist_ok=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="trajectories could not be written"):
            await backend.train(policy, groups)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(jobs.iterdir())
    assert (await backend.train(policy, groups, learning_rate=0.5)).step == 1
    assert await asked.served_by() == ("m@1", -1.5)


@pytest.fixture
def looks_often(monkeypatch, tmp_path):
    """Hosts started from here look often whether their servers stand still."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "from art_backend_local.servers import standstill\nstandstill.EVERY_S, standstill.TIMEOUT_S = 0.2, 0.3\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}")


async def test_a_training_worker_that_stands_still_is_noticed_and_ended(
    fake_engines, looks_often, tmp_path, new_backend, policy, groups, program, said_by_engine
):
    async with new_backend(tmp_path / "art") as backend:
        await backend.register(policy)
        fake_engines(hold_train=True)
        step = asyncio.create_task(backend.train(policy, groups))
        await said_by_engine(backend.path, "training", f"job begun {policy.project}/m@1")
        worker = program(read_host(backend.path).pid, "training_worker")
        worker.suspend()
        with pytest.raises(TrainingFailed, match="had not answered its health check") as raised:
            await asyncio.wait_for(step, 60)
        assert "the next step starts a new worker" in str(raised.value)
        assert not process_lives(worker.pid, None)
        fake_engines()
        assert (await backend.train(policy, groups)).step == 1


async def test_a_step_is_cancelled_though_its_worker_stands_still(
    fake_engines, looks_often, tmp_path, new_backend, policy, groups, program, said_by_engine, until
):
    async with new_backend(tmp_path / "art") as backend:
        await backend.register(policy)
        fake_engines(hold_train=True)
        step = asyncio.create_task(backend.train(policy, groups))
        await said_by_engine(backend.path, "training", f"job begun {policy.project}/m@1")
        worker = program(read_host(backend.path).pid, "training_worker")
        worker.suspend()
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(step, 60)
        await until(lambda: not process_lives(worker.pid, None))
        fake_engines()
        assert (await backend.train(policy, groups)).step == 1


async def test_an_idle_worker_that_stands_still_fails_the_next_step_alone(
    fake_engines, looks_often, tmp_path, new_backend, policy, groups, program
):
    async with new_backend(tmp_path / "art") as backend:
        await backend.register(policy)
        assert (await backend.train(policy, groups)).step == 1
        program(read_host(backend.path).pid, "training_worker").suspend()
        with pytest.raises(TrainingFailed, match="had not answered its health check"):
            await asyncio.wait_for(backend.train(policy, groups), 60)
        assert (await backend.train(policy, groups)).step == 2


async def test_an_inference_server_that_stands_still_is_ended_and_comes_back(
    looks_often, tmp_path, new_backend, policy, groups, client, program
):
    async with new_backend(tmp_path / "art") as backend:
        asked = client(await backend.register(policy))
        await backend.train(policy, groups, learning_rate=0.5)
        server = program(read_host(backend.path).pid, "inference_server")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            server.suspend()
            assert await asyncio.wait_for(asked.with_options(max_retries=2).served_by(), 60) == ("m@1", -1.5)
        assert "runs but has not answered" in " ".join(str(w.message) for w in warned)
        assert not process_lives(server.pid, None)
