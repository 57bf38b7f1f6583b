"""LocalBackend with several inference servers, and with servers that the user runs: real ones of engine torch on the
tiny model.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import warnings
from contextlib import asynccontextmanager, suppress

import aiohttp
import psutil
import pytest

from art_backend_local import LocalBackend
from art_conformance.oracle import Oracle, agreement
from art_core import InferenceLaunch, Trajectory, TrajectoryGroup, installed_plugins
from art_core.errors import ServerUnusable
from art_engine_kit.checkpoint_folder import step_folder
from art_engine_torch.inference_engine import TorchInferenceEngine
from art_runtime import SupervisedProcess, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MESSAGES = [{"role": "user", "content": "hello there"}]
KEY = "the-key-of-the-users-server"


@pytest.fixture(scope="module")
def oracle(base):
    return Oracle(base)


def make_backend(path, **options):
    return LocalBackend(
        path=path, in_process=True, inference_engine="torch", training_engine="torch", show_progress=False, **options
    )


async def ask(client, name="m", *, max_tokens=8, **sampling):
    return await client.chat.completions.create(
        model=name, messages=MESSAGES, max_tokens=max_tokens, extra_body={"ignore_eos": True}, **sampling
    )


async def gather(client):
    async def attempt(seed):
        choice = (await ask(client, seed=seed)).choices[0]
        return Trajectory(messages_and_choices=[*MESSAGES, choice], reward=float(sum(choice.token_ids) % 7))

    return [TrajectoryGroup(await asyncio.gather(*(attempt(seed) for seed in range(6))))]


def assert_answers_as(oracle, answer, folder):
    """The answer's logprobs are those of the adapter in `folder`, by transformers and PEFT."""
    choice = answer.choices[0]
    true = oracle.logprobs(choice.prompt_token_ids, choice.token_ids, folder)
    assert agreement([entry.logprob for entry in choice.logprobs.content], true).mean < 1e-4


async def engines_of(path):
    """What `art ps` says of the inference servers of the backend at `path`."""
    listed = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-m", "art_core", "ps", "--json"], capture_output=True, text=True, check=True
    )
    (host,) = [host for host in json.loads(listed.stdout) if host["path"] == str(path)]
    return host["engines"]


async def until_all_are_up(path):
    async with asyncio.timeout(120):
        while not all(engine["up"] for engine in await engines_of(path)):
            await asyncio.sleep(0.2)


async def until_both_are_busy(path):
    """Wait until requests are under way on both servers at once; gives what `art ps` says of them then."""
    async with asyncio.timeout(60):
        while True:
            engines = await engines_of(path)
            if all(engine["in_flight"] for engine in engines):
                return engines


async def keep_asking(client, answers, ended):
    while not ended.is_set():
        answers.append(await ask(client, max_tokens=40))


async def test_a_replica_that_is_killed_costs_no_request_and_comes_back_with_every_step(
    tmp_path, make_policy, client, oracle, base
):
    policy, path = make_policy(fp32=True), tmp_path / "art"
    async with make_backend(path, inference_replicas=2) as backend:
        asked = client(await backend.register(policy))
        assert [engine["up"] for engine in await engines_of(path)] == [True, True]
        groups = await gather(asked)
        answers, ended = [], asyncio.Event()
        asking = [asyncio.create_task(keep_asking(asked, answers, ended)) for _ in range(6)]
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for killed in (0, 1):
                engines = await until_both_are_busy(path)
                psutil.Process(engines[killed]["pid"]).kill()
                # A step is published while one server is away; the other one must get it when it is back.
                step = (await backend.train(policy, groups, learning_rate=1e-2)).step
                await until_all_are_up(path)
        ended.set()
        await asyncio.gather(*asking)
        said = " ".join(str(w.message) for w in warned)
        assert "(1 of 2) died and is being restarted" in said
        assert "1 of 2 go on" in said
        steps = [int(answer.model.partition("@")[2]) for answer in answers]
        assert set(steps) == {0, 1, 2}
        for answer in answers[::10]:
            number = int(answer.model.partition("@")[2])
            assert_answers_as(oracle, answer, step_folder(path / policy.project / "models/m/checkpoints", number))
        # Every server answers as the last step, whichever is asked.
        for answer in await asyncio.gather(*(ask(asked) for _ in range(6))):
            assert answer.model == f"m@{step}"
            assert_answers_as(oracle, answer, step_folder(path / policy.project / "models/m/checkpoints", step))


async def test_all_replicas_killed_at_once_come_back(tmp_path, make_policy, client, oracle):
    policy, path = make_policy(fp32=True), tmp_path / "art"
    async with make_backend(path, inference_replicas=2) as backend:
        asked = client(await backend.register(policy))
        await backend.train(policy, await gather(asked), learning_rate=1e-2)
        under_way = [asyncio.create_task(ask(asked)) for _ in range(4)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for engine in await engines_of(path):
                psutil.Process(engine["pid"]).kill()
            for answer in await asyncio.gather(*under_way, *(ask(asked) for _ in range(4))):
                assert answer.model == "m@1"
                assert_answers_as(oracle, answer, step_folder(path / policy.project / "models/m/checkpoints", 1))
            await until_all_are_up(path)


def test_replicas_that_make_no_sense_are_refused_at_once(tmp_path):
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="inference_replicas must be a whole number"):
            LocalBackend(path=tmp_path, inference_replicas=wrong)


@asynccontextmanager
async def users_server(base, log_file, *, port=None, key=KEY):
    """A server of engine torch that a user has started; gives its process."""
    port = port or free_port()
    launch = InferenceLaunch(
        base_model=base,
        served_name="mine",
        host="127.0.0.1",
        port=port,
        api_key=key,
        python=sys.executable,
        dtype="float32",
    )
    server = await SupervisedProcess.start(TorchInferenceEngine().launch(launch), port=port, log_file=log_file)
    try:
        yield server
    finally:
        await server.stop()


async def adapters_of(server):
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session,
        session.get(f"{server.base_url}/v1/models") as answer,
    ):
        return TorchInferenceEngine().read_adapters(await answer.read())


async def test_a_server_of_the_users_is_published_to_and_outlives_the_backend(
    tmp_path, make_policy, client, oracle, base, until
):
    policy, path = make_policy(fp32=True), tmp_path / "art"
    mine = {"inference_api_key": KEY}
    async with users_server(base, tmp_path / "server.log") as server:
        async with make_backend(path, inference_url=f"{server.base_url}/v1/", **mine) as backend:
            asked = client(await backend.register(policy))
            step = (await backend.train(policy, await gather(asked), learning_rate=1e-2)).step
            answer = await ask(asked)
            assert answer.model == "m@1"
            assert_answers_as(oracle, answer, step_folder(path / policy.project / "models/m/checkpoints", step))
        assert server.running
        left = await adapters_of(server)
        assert f"{policy.project}/m@1" in left
        # The next host finds what this one left, trusts none of it, and serves the same step.
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            async with make_backend(path, inference_url=server.base_url, **mine) as backend:
                asked = client(await backend.register(policy))
                assert (await ask(asked)).model == "m@1"
                await until(lambda: any("which an earlier host had left there" in str(w.message) for w in warned))
        log = (path / "logs/host.log").read_text()
        assert KEY not in log + json.dumps(await asyncio.to_thread(_everything_written, path))


def _everything_written(path):
    return [file.read_text(errors="replace") for file in path.rglob("*.json*") if file.is_file()]


async def test_a_server_of_the_users_that_restarts_gets_every_adapter_again(
    tmp_path, make_policy, client, oracle, base, until
):
    policy, path, port = make_policy(fp32=True), tmp_path / "art", free_port()
    url = f"http://127.0.0.1:{port}"
    async with make_backend(path, inference_url=url, inference_api_key=KEY) as backend:
        # Heard from before it stops: the host may see at once that it is gone, while this waits for its end.
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            async with users_server(base, tmp_path / "server.log", port=port):
                asked = client(await backend.register(policy))
                await backend.train(policy, await gather(asked), learning_rate=1e-2)
            waiting = asyncio.create_task(ask(asked))
            await until(lambda: any("was lost and is asked for again" in str(w.message) for w in warned))
            assert not waiting.done()
            async with users_server(base, tmp_path / "server.log", port=port):
                answer = await waiting
                assert answer.model == "m@1"
                assert_answers_as(oracle, answer, step_folder(path / policy.project / "models/m/checkpoints", 1))


async def test_a_server_that_cannot_be_used_says_what_is_missing(tmp_path, make_policy, base):
    card = installed_plugins().inference_engine("torch")
    nobody = f"http://127.0.0.1:{free_port()}"
    with make_backend(tmp_path / "art", inference_url=nobody) as backend:
        with pytest.raises(ServerUnusable) as failure:
            await backend.register(make_policy())
        assert "does not answer" in str(failure.value)
        assert card.own_server in str(failure.value)
    async with users_server(base, tmp_path / "server.log") as server:
        for key, said in ((None, "a request without a key"), ("another", "the key that it was given")):
            backend = make_backend(tmp_path / "art", inference_url=server.base_url, inference_api_key=key)
            with backend, pytest.raises(ServerUnusable, match=said) as failure:
                await backend.register(make_policy())
            assert "inference_api_key" in str(failure.value)


async def test_a_server_that_does_not_load_adapters_says_how_it_must_be_started(tmp_path, make_policy, base):
    async def answer(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        listing = head.startswith("GET /v1/models")
        body = b'{"object": "list", "data": [{"id": "mine"}]}' if listing else b'{"error": "not found"}'
        status = b"200 OK" if listing else b"404 Not Found"
        writer.write(b"HTTP/1.1 %s\r\nContent-Type: application/json\r\n" % status)
        writer.write(b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
        with suppress(ConnectionError):
            await writer.drain()
        writer.close()

    stranger = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with stranger:
        url = f"http://127.0.0.1:{stranger.sockets[0].getsockname()[1]}"
        with make_backend(tmp_path / "art", inference_url=url) as backend:
            with pytest.raises(ServerUnusable, match="load adapter") as failure:
                await backend.register(make_policy())
            assert installed_plugins().inference_engine("torch").own_server in str(failure.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inference_url": "127.0.0.1:8000"}, "must be an address such as"),
        ({"inference_url": "ftp://127.0.0.1"}, "must be an address such as"),
        ({"inference_url": []}, "empty list"),
        ({"inference_url": ["http://a", "http://a/v1"]}, "names a server twice"),
        ({"inference_url": "http://a", "inference_replicas": 2}, "give a list as inference_url"),
        ({"inference_url": "http://a", "inference_python": "python"}, "give one of them"),
        ({"inference_url": "http://a", "inference_engine": None}, "how to speak to the server"),
        ({"inference_api_key": "secret"}, "give its inference_url too"),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_once(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        LocalBackend(**{"path": tmp_path, "inference_engine": "torch", **options})


def test_a_key_in_an_address_is_not_repeated(tmp_path):
    with pytest.raises(ValueError, match="must be an address") as failure:
        LocalBackend(path=tmp_path, inference_engine="torch", inference_url="http://user:secret@host:1")
    assert "secret" not in str(failure.value)
