"""What goes wrong around LocalBackend: processes killed, disks full, two clients on one path. On the fake engines."""

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings

import psutil
import pytest
from openai import APIStatusError

from art_backend_local import PathInUse
from art_backend_local.wire.host_files import known_hosts, process_lives, read_host
from art_core.errors import BackendUnreachable, ProcessFailed, TrainingFailed
from art_engine_kit.checkpoint_folder import whole_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
MESSAGES = [{"role": "user", "content": "hello"}]
CLIENT = """
    import asyncio, json, signal, sys
    from types import SimpleNamespace
    from art_backend_local import LocalBackend
    from art_core import Trajectory, TrajectoryGroup

    path, base, project, in_process = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "True"
    model = SimpleNamespace(name="m", project=project, entity=None, base_model=base, internal_config={})
    groups = [TrajectoryGroup([Trajectory(reward=0.0), Trajectory(reward=1.0)])]

    def say(**what):
        print(json.dumps(what), flush=True)

    async def main():
        backend = LocalBackend(path=path, in_process=in_process, inference_engine="fake", training_engine="fake",
                               show_progress=False)
        async with backend:
            await backend.register(model)
            say(registered=await backend.get_step(model))
            %s

    # Tests that run in the background of a shell inherit an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        say(interrupted=True)
        raise
"""


@pytest.fixture
def run_client(base, project, fake_engines):
    """Run client code in a process of its own; gives the process. Killed in the end."""
    started = []

    def run(path, code="await asyncio.sleep(600)", *, in_process=True):
        body = textwrap.dedent(CLIENT) % textwrap.indent(textwrap.dedent(code), " " * 8).strip()
        process = subprocess.Popen(
            [sys.executable, "-c", body, str(path), str(base), project, str(in_process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def said(process, key):
    """Read what a client says until it says `key`."""
    for line in process.stdout:
        value = json.loads(line)
        if key in value:
            return value[key]
    raise AssertionError(f"the client ended without saying {key}: {process.stderr.read()[-3000:]}")


def kill(process):
    """SIGKILL, and it is dead: until then its path is rightly in use."""
    process.kill()
    process.wait(20)


async def until(condition, limit_s=60):
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.02)


def tree(pid):
    """The processes below one, with their start times."""
    return [(p.pid, p.create_time()) for p in psutil.Process(pid).children(recursive=True)]


def program(pid, word):
    """The process below `pid` whose command line has `word`."""
    for child in psutil.Process(pid).children(recursive=True):
        line = child.cmdline()
        if any(word in part for part in line) and not any("tether" in part for part in line):
            return child
    raise AssertionError(f"no process of {word}")


async def served_by(client, name="m"):
    answer = await client.chat.completions.create(model=name, messages=MESSAGES)
    return answer.model, round(answer.choices[0].logprobs.content[0].logprob, 6)


async def test_everything_ends_with_a_client_that_is_killed(run_client, tmp_path):
    process = run_client(tmp_path / "art")
    said(process, "registered")
    below = tree(process.pid)
    assert len(below) >= 3
    kill(process)
    await until(lambda: not any(process_lives(pid, started) for pid, started in below))
    assert not (tmp_path / "art/host.json").exists()


async def test_a_path_in_use_by_an_in_process_backend_is_refused_naming_it(run_client, tmp_path, new_backend, policy):
    process = run_client(tmp_path / "art")
    said(process, "registered")
    for in_process in (True, False):
        with pytest.raises(PathInUse, match=f"process {process.pid}"):
            await new_backend(tmp_path / "art", in_process=in_process).register(policy)
    # The path is free as soon as that client has ended, even while its host is still leaving.
    kill(process)
    async with new_backend(tmp_path / "art") as backend:
        await backend.register(policy)


async def test_a_host_that_outlives_its_client_is_found_again_and_shared(
    run_client, tmp_path, new_backend, policy, groups, client
):
    path = tmp_path / "art"
    first = run_client(path, "say(step=(await backend.train(model, groups, learning_rate=0.5)).step)", in_process=False)
    assert said(first, "step") == 1
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
        assert await served_by(client(registration)) == ("m@1", -1.5)
        assert program(record.pid, "inference_server").pid == engine
        assert (await backend.train(policy, groups)).step == 2
    down = subprocess.run(
        [sys.executable, "-m", "art_core", "down", "--path", str(path)], capture_output=True, text=True, check=True
    )
    assert "has ended" in down.stdout
    assert not record.alive
    assert not process_lives(engine, None)
    assert (path, record) not in known_hosts()


async def test_art_ps_lists_hosts_with_their_models(tmp_path, new_backend, policy):
    async with new_backend(tmp_path / "art") as backend:
        await backend.register(policy)
        listed = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "art_core", "ps", "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        (host,) = [host for host in json.loads(listed.stdout) if host["path"] == str(tmp_path / "art")]
        assert host["answers"]
        assert host["models"][0] | {"project": policy.project, "name": "m", "routed": 0} == host["models"][0]
        assert host["engines"][0]["engine"] == "fake"
        assert host["engines"][0]["memory"] > 0


async def test_a_host_nobody_uses_ends_by_itself(tmp_path, new_backend, policy):
    async with new_backend(tmp_path / "art", in_process=False, idle_timeout_s=0.5) as backend:
        await backend.register(policy)
        record = read_host(tmp_path / "art")
        await asyncio.sleep(3)
        assert record.alive
    await until(lambda: not record.alive)


async def test_a_stale_record_of_a_dead_host_is_no_obstacle(tmp_path, new_backend, policy):
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


async def test_a_killed_engine_comes_back_with_the_right_steps(backend, policy, groups, client):
    asked = client(await backend.register(policy))
    await backend.train(policy, groups, learning_rate=0.5)
    async with backend.lease(policy, 0):
        host = read_host(backend.path).pid
        engine = program(host, "inference_server")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            waiting = asyncio.create_task(
                asked.chat.completions.create(model="m", messages=[{"role": "user", "content": "sleep 2"}])
            )
            await asyncio.sleep(0.3)
            engine.kill()
            # What was under way is asked again of the restarted engine, under the step that it was routed to.
            assert (await waiting).model == "m@1"
            asked = asked.with_options(max_retries=2)
            answers = await asyncio.gather(*(served_by(asked) for _ in range(5)), served_by(asked, "m@0"))
            await asyncio.sleep(0.1)
        assert set(answers[:-1]) == {("m@1", -1.5)}
        assert answers[-1] == ("m@0", -1.0)
        said_ = " ".join(str(w.message) for w in warned)
        assert "died and is being restarted" in said_
        assert "answered" in said_, "the end of the engine's log belongs to the report"
        assert program(host, "inference_server").pid != engine.pid
    assert (await backend.train(policy, groups, learning_rate=0.5)).step == 2


async def test_an_engine_that_cannot_start_again_is_reported_with_its_log(new_backend, tmp_path, policy, groups, client,
                                                                          fake_engines):  # fmt: skip
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
                        await served_by(asked)
                    assert failure.value.status_code in (502, 503)
                    said_ = str(failure.value)
            with pytest.raises(ProcessFailed, match="ordered not to start"):
                await backend.register(policy)
            fake_engines()
            asked = client(await backend.register(policy))
            assert await served_by(asked) == ("m@0", -1.0)


async def test_a_killed_worker_fails_the_step_and_the_next_one_works(backend, policy, groups, fake_engines, client):
    asked = client(await backend.register(policy))
    before = _begun(backend)
    fake_engines(crash=True)
    with pytest.raises(TrainingFailed, match="ordered to crash"):
        await backend.train(policy, groups)
    fake_engines(slow_train=30)
    step = asyncio.create_task(backend.train(policy, groups))
    host = read_host(backend.path).pid
    await until(lambda: _begun(backend) == before + 2)
    program(host, "training_worker").kill()
    with pytest.raises(TrainingFailed, match="SIGKILL"):
        await step
    fake_engines()
    result = await backend.train(policy, groups, learning_rate=0.5)
    assert (result.step, await served_by(asked)) == (1, ("m@1", -1.5))


async def test_a_full_disk_at_saving_is_clear_and_loses_nothing(backend, policy, groups, fake_engines, client):
    asked = client(await backend.register(policy))
    await backend.train(policy, groups, learning_rate=0.5)
    fake_engines(fail="step 2 could not be saved: the disk is full")
    with pytest.raises(OSError, match="the disk is full"):
        await backend.train(policy, groups)
    assert await served_by(asked) == ("m@1", -1.5)
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
    assert await served_by(asked) == ("m@1", -1.5)


async def test_a_client_killed_in_the_middle_of_training_keeps_nothing_and_lets_go(
    run_client, tmp_path, new_backend, policy, groups, fake_engines, checkpoints
):
    path = tmp_path / "art"
    async with new_backend(path, in_process=False) as backend:
        await backend.register(policy)
        fake_engines(slow_train=60)
        other = run_client(path, "say(training=1); await backend.train(model, groups)", in_process=False)
        said(other, "training")
        await until(lambda: "training" in str(_statuses(backend)))
        await until(lambda: _statuses(backend)["models"][0]["training"])
        await asyncio.sleep(1.0)  # the host says so before the job has reached the worker
        kill(other)
        await until(lambda: not _statuses(backend)["models"][0]["training"])
        fake_engines()
        assert (await backend.train(policy, groups)).step == 1
        assert list(whole_steps(checkpoints(backend))) == [0, 1]
        await asyncio.to_thread(_down, path)


async def test_a_client_killed_in_the_middle_of_publishing_leaves_a_step_that_is_served_later(
    run_client, tmp_path, new_backend, policy, client, fake_engines, checkpoints
):
    path = tmp_path / "art"
    first = run_client(path, "say(begun=1); await backend.train(model, groups, learning_rate=0.5)", in_process=True)
    fake_engines(slow_load=0)
    said(first, "registered")
    fake_engines(slow_load=60)
    said(first, "begun")
    await until(lambda: (path / policy.project / "models/m/checkpoints/0001/checkpoint.json").exists())
    kill(first)
    fake_engines()
    async with new_backend(path) as backend:
        assert await served_by(client(await backend.register(policy))) == ("m@1", -1.5)


async def test_a_client_that_dies_frees_its_leases(run_client, tmp_path, new_backend, policy, groups):
    path = tmp_path / "art"
    async with new_backend(path, in_process=False) as backend:
        await backend.register(policy)
        code = """
            async with backend.lease(model, 0):
                say(leased=1)
                await asyncio.sleep(600)
        """
        other = run_client(path, code, in_process=False)
        said(other, "leased")
        await backend.train(policy, groups)
        from art_core.errors import CheckpointInUse

        with pytest.raises(CheckpointInUse):
            await backend.delete_checkpoints(policy, [0])
        kill(other)
        async with asyncio.timeout(30):
            while True:
                try:
                    assert await backend.delete_checkpoints(policy, [0]) == [0]
                    break
                except CheckpointInUse:
                    await asyncio.sleep(0.05)
        await asyncio.to_thread(_down, path)


async def test_ctrl_c_cancels_the_step_and_ends_everything(run_client, tmp_path, fake_engines):
    fake_engines(slow_train=60)
    process = run_client(tmp_path / "art", "say(training=1); await backend.train(model, groups)")
    said(process, "training")
    await until(lambda: "job begun" in (tmp_path / "art/logs/training-fake-base.log").read_text())
    below = tree(process.pid)
    process.send_signal(signal.SIGINT)
    assert said(process, "interrupted")
    await until(lambda: process.poll() is not None)
    await until(lambda: not any(process_lives(pid, started) for pid, started in below))


async def test_a_second_ctrl_c_ends_the_client_at_once(run_client, tmp_path, fake_engines):
    process = run_client(tmp_path / "art", "say(training=1); await backend.train(model, groups)")
    fake_engines(slow_train=60)
    said(process, "training")
    below = tree(process.pid)
    # A host that doesn't leave: the client may not wait for it after the second signal.
    host = read_host(tmp_path / "art").pid
    os.kill(host, signal.SIGSTOP)
    try:
        process.send_signal(signal.SIGINT)
        await asyncio.sleep(1.0)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        await until(lambda: process.poll() is not None, limit_s=20)
        print(f"ended {time.monotonic() - began:.2f} s after the second signal")
    finally:
        os.kill(host, signal.SIGCONT)
    await until(lambda: not any(process_lives(pid, started) for pid, started in below))


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
            assert await served_by(client(await backend.register(policy))) == ("m@0", -1.0)
        assert f"inference_server {taken}" in (tmp_path / "art/logs/inference-fake-base.log").read_text()


def _begun(backend):
    log = backend.path / "logs/training-fake-base.log"
    return log.read_text().count("job begun") if log.exists() else 0


def _statuses(backend):
    import httpx

    record = read_host(backend.path)
    answer = httpx.get(f"{record.url}/_art/status", headers={"Authorization": f"Bearer {record.token}"}, timeout=30)
    return answer.json()


def _down(path):
    subprocess.run([sys.executable, "-m", "art_core", "down", "--path", str(path)], check=True, capture_output=True)
