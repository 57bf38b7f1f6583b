"""How long a host of LocalBackend lives, who may use its path, how it is found, listed and ended. On fake engines."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import warnings

import pytest

from art_backend_local import PathInUse
from art_backend_local.wire.host_files import known_hosts, read_host
from art_core.errors import BackendUnreachable
from art_runtime.process_identity import process_lives

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


async def test_a_path_in_use_by_an_in_process_backend_is_refused_naming_it(run_client, tmp_path, new_backend, policy):
    process = run_client(tmp_path / "art")
    process.said("registered")
    for in_process in (True, False):
        with pytest.raises(PathInUse, match=f"process {process.pid}"):
            await new_backend(tmp_path / "art", in_process=in_process).register(policy)
    # The path is free as soon as that client has ended, even while its host is still leaving.
    process.kill_and_wait()
    async with new_backend(tmp_path / "art") as backend:
        await backend.register(policy)


async def test_a_host_that_outlives_its_client_is_found_again_and_shared(
    run_client, tmp_path, new_backend, policy, groups, client, program
):
    path = tmp_path / "art"
    first = run_client(path, "say(step=(await backend.train(model, groups, learning_rate=0.5)).step)", in_process=False)
    assert first.said("step") == 1
    assert first.wait(60) == 0
    record = read_host(path)
    assert record is not None
    assert record.alive
    assert (path / "host.json").stat().st_mode & 0o777 == 0o600
    engine = program(record.pid, "inference_server").pid
    assert (path, record) in known_hosts()
    with pytest.raises(PathInUse, match=f"host process {record.pid}"):
        await new_backend(path).register(policy)
    async with new_backend(path, in_process=False) as backend:
        registration = await backend.register(policy)
        assert await client(registration).served_by() == ("m@1", -1.5)
        assert program(record.pid, "inference_server").pid == engine
        assert (await backend.train(policy, groups)).step == 2
    down = subprocess.run(
        [sys.executable, "-m", "art_core", "down", "--path", str(path)], capture_output=True, text=True, check=True
    )
    assert "has ended" in down.stdout
    assert not record.alive
    assert not process_lives(engine, None)
    assert (path, record) not in known_hosts()


async def test_art_ps_lists_hosts_with_their_models(tmp_path, new_backend, policy, ps):
    async with new_backend(tmp_path / "art") as backend:
        await backend.register(policy)
        host = await ps(backend.path)
        assert host["answers"]
        assert host["models"][0] | {"project": policy.project, "name": "m", "routed": 0} == host["models"][0]
        assert host["engines"][0]["engine"] == "fake"
        assert host["engines"][0]["memory"] > 0


async def test_a_host_nobody_uses_ends_by_itself(tmp_path, new_backend, policy, until):
    async with new_backend(tmp_path / "art", in_process=False, idle_timeout_s=0.5) as backend:
        await backend.register(policy)
        record = read_host(tmp_path / "art")
        # Several times the limit: who is there, though silent, keeps it.
        await asyncio.sleep(1.5)
        assert record.alive
    await until(lambda: not record.alive)


async def test_a_stale_record_of_a_dead_host_is_no_obstacle(tmp_path, new_backend, policy, until):
    async with new_backend(tmp_path / "art", in_process=False) as backend:
        await backend.register(policy)
        record = read_host(tmp_path / "art")
        os.kill(record.pid, signal.SIGKILL)
        with pytest.raises(BackendUnreachable, match=r"host\.log"):
            for _ in range(100):
                await backend.get_step(policy)
                await asyncio.sleep(0.05)
    await until(lambda: not record.alive)
    assert (tmp_path / "art/host.json").exists()
    async with new_backend(tmp_path / "art") as backend:
        await backend.register(policy)
        assert read_host(tmp_path / "art").pid != record.pid


async def test_a_call_under_way_ends_with_the_session_and_says_so(
    tmp_path, new_backend, policy, groups, fake_engines, said_by_engine, until
):
    async with new_backend(tmp_path / "art") as backend:
        await backend.register(policy)
        fake_engines(hold_train=True)
        training = asyncio.create_task(backend.train(policy, groups))
        await said_by_engine(backend.path, "training", f"job begun {policy.project}/m@1")
        (listening,) = [task for task in asyncio.all_tasks() if task.get_name().startswith("session with the host")]
        listening.cancel()
        with pytest.raises(BackendUnreachable, match="the connection was closed"):
            await asyncio.wait_for(training, 60)
        fake_engines()
        assert (await backend.train(policy, groups)).step == 1


async def test_a_warning_that_is_made_an_error_ends_no_session(
    tmp_path, new_backend, policy, program, until, ps, caplog
):
    async with new_backend(tmp_path / "art") as backend:
        await backend.register(policy)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            program(read_host(backend.path).pid, "inference_server").kill()
            await until(lambda: "is back" in caplog.text)
        assert (await ps(backend.path))["clients"] == 1
    assert "died and is being restarted" in caplog.text


async def test_a_port_that_a_stranger_takes_first_is_no_obstacle(new_backend, tmp_path, policy, monkeypatch, client):
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken = stranger.getsockname()[1]
        folder = tmp_path / "site"
        folder.mkdir()
        # In the host, the first two ports found free are those that the stranger has by then.
        (folder / "sitecustomize.py").write_text(
            "import art_runtime\n"
            f"real, given = art_runtime.free_port, [{taken}, {taken}]\n"
            "art_runtime.free_port = lambda: given.pop() if given else real()\n"
        )
        monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}")
        async with new_backend(tmp_path / "art") as backend:
            assert await client(await backend.register(policy)).served_by() == ("m@0", -1.0)
        assert f"inference_server {taken}" in (tmp_path / "art/logs/inference-fake-base.log").read_text()


async def test_ctrl_c_cancels_the_step_and_ends_everything(
    run_client, tmp_path, policy, fake_engines, said_by_engine, until
):
    fake_engines(hold_train=True)
    process = run_client(tmp_path / "art", "say(training=1); await backend.train(model, groups)")
    process.said("training")
    await said_by_engine(tmp_path / "art", "training", f"job begun {policy.project}/m@1")
    below = process.below()
    process.send_signal(signal.SIGINT)
    assert process.said("interrupted")
    await until(lambda: process.poll() is not None)
    await until(lambda: not any(process_lives(pid, identity) for pid, identity in below))


async def test_a_second_ctrl_c_ends_the_client_at_once(
    run_client, tmp_path, policy, fake_engines, said_by_engine, until
):
    fake_engines(hold_train=True)
    code = """
        try:
            await backend.train(model, groups)
        finally:
            say(leaving=1)
    """
    process = run_client(tmp_path / "art", code)
    await said_by_engine(tmp_path / "art", "training", f"job begun {policy.project}/m@1")
    below = process.below()
    # A host that doesn't leave: the client may not wait for it after the second signal.
    host = read_host(tmp_path / "art").pid
    os.kill(host, signal.SIGSTOP)
    try:
        process.send_signal(signal.SIGINT)
        process.said("leaving")
        await asyncio.sleep(0.5)
        assert process.poll() is None, "it waits for its host"
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        await until(lambda: process.poll() is not None, limit_s=20)
        print(f"ended {time.monotonic() - began:.2f} s after the second signal")
    finally:
        os.kill(host, signal.SIGCONT)
    await until(lambda: not any(process_lives(pid, identity) for pid, identity in below))
