"""LocalBackend beside peers that err at random: a real server of engine torch behind a proxy that breaks off, loses,
garbles and repeats. Every call ends with its result or with an error in words, nothing is served under a wrong name or
half there, and once the peer is well again the same calls work.
"""

from __future__ import annotations

import asyncio
import sys
import warnings
from contextlib import asynccontextmanager

import openai
import pytest

from art_backend_local import LocalBackend
from art_backend_local.servers.canary_reading import canary_request, first_token
from art_backend_local.servers.engine_connection import EngineConnection
from art_conformance.erring_proxy import ErringProxy
from art_conformance.oracle import agreement, oracle_for
from art_conformance.tiny_model import write_adapter
from art_core import ArtError, InferenceLaunch, Trajectory, TrajectoryGroup
from art_engine_kit.checkpoint_folder import step_folder, whole_steps
from art_engine_torch.inference_engine import TorchInferenceEngine
from art_runtime import SupervisedProcess, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
MESSAGES = [{"role": "user", "content": "hello there"}]
KEY = "the-key-of-the-users-server"
# Beyond what a call that is repeated until a server is back may take.
LIMIT_S = 60.0


@pytest.fixture
async def users_server(base, tmp_path):
    """A server of engine torch that a user has started."""
    port = free_port()
    launch = InferenceLaunch(
        base_model=base, served_name="mine", host="127.0.0.1", port=port, api_key=KEY, python=sys.executable,
        dtype="float32",
    )  # fmt: skip
    plan = TorchInferenceEngine().launch(launch)
    server = await SupervisedProcess.start(plan, port=port, log_file=tmp_path / "server.log")
    yield server
    await server.stop()


@asynccontextmanager
async def behind_a_proxy(path, server, seed):
    """A backend whose server is reached through a proxy; gives both."""
    async with ErringProxy(server.base_url, seed=seed) as proxy:
        engines = {"inference_engine": "torch", "training_engine": "torch", "show_progress": False}
        mine = {"inference_url": proxy.url, "inference_api_key": KEY}
        async with LocalBackend(path=path, in_process=True, **engines, **mine) as backend:
            yield backend, proxy


async def ended(call, proxy, *kinds):
    """What became of a call: its result, or an error of these kinds that says why."""
    try:
        async with asyncio.timeout(LIMIT_S):
            return await call
    except Exception as error:
        # What the gateway passes on of an engine's refusal is in the error's body.
        if not isinstance(error, kinds) or len(f"{error} {getattr(error, 'body', '')}") < 20:
            said = "\n".join(proxy.said[-20:])
            raise AssertionError(f"no error in words but {error!r}, after\n{said}") from error
        return error


async def ask(client, name="m"):
    return await client.chat.completions.create(
        model=name, messages=MESSAGES, max_tokens=6, logprobs=True, extra_body={"ignore_eos": True}
    )


def assert_named_rightly(base, answer, checkpoints):
    """An answer is of the weights of the step that it names."""
    choice, step = answer.choices[0], int(answer.model.partition("@")[2])
    true = oracle_for(base).logprobs(choice.prompt_token_ids, choice.token_ids, step_folder(checkpoints, step))
    assert agreement([entry.logprob for entry in choice.logprobs.content], true).mean < 1e-3, answer.model
    return step


@pytest.mark.parametrize("seed", range(2))
async def test_a_server_that_errs_is_never_taken_for_another_step(
    users_server, base, make_policy, client, checkpoints, tmp_path, seed
):
    policy = make_policy(f"m{seed}", fp32=True)
    async with behind_a_proxy(tmp_path / "art", users_server, seed) as (backend, proxy):
        asked = client(await backend.register(policy))
        folder = checkpoints(backend, policy.name)
        first = await ask(asked, policy.name)
        groups = [
            TrajectoryGroup(
                Trajectory(messages_and_choices=[*MESSAGES, first.choices[0]], reward=reward) for reward in (0.0, 1.0)
            )
        ]
        with warnings.catch_warnings():
            # A server that is lost and found again is told of.
            warnings.simplefilter("ignore")
            for _ in range(2):
                before = await backend.get_step(policy)
                proxy.rate = 0.3
                step = await ended(backend.train(policy, groups, learning_rate=1e-2), proxy, ArtError)
                names = [policy.name, f"{policy.name}@0", f"{policy.name}@{before}", policy.name]
                answers = [await ended(ask(asked, name), proxy, openai.APIStatusError) for name in names]
                proxy.rate = 0.0
                for name, answer in zip(names, answers, strict=True):
                    if isinstance(answer, openai.APIStatusError):
                        continue
                    served = assert_named_rightly(base, answer, folder)
                    assert "@" not in name or answer.model == name
                    assert before <= served or "@" in name, "the route went back"
                if not isinstance(step, ArtError):
                    assert step.step > before
                # From a peer that is well: what was saved and not published comes first, then a step of this call.
                async with asyncio.timeout(LIMIT_S):
                    after = (await backend.train(policy, groups, learning_rate=1e-2)).step
                    answer = await ask(asked, policy.name)
                assert await backend.get_step(policy) == after == assert_named_rightly(base, answer, folder)
                assert set(await backend.list_steps(policy)) <= set(whole_steps(folder)), "a step is half there"
                assert not list(folder.glob(".saving-*")), "a step was left half there"
                for listed in await backend.list_steps(policy):
                    assert_named_rightly(base, await ask(asked, f"{policy.name}@{listed}"), folder)


@pytest.mark.parametrize("seed", [0, 3])
async def test_every_call_to_a_server_that_errs_is_done_or_refused_in_words(users_server, base, tmp_path, seed):
    adapters = [write_adapter(tmp_path / f"a{n}", base, seed=n, strength=0.3) for n in range(3)]
    engine, prompt = TorchInferenceEngine(), [5, 6, 7]
    async with ErringProxy(users_server.base_url, seed=seed) as proxy:
        connection = EngineConnection(engine, proxy.url, KEY, evidence=lambda: "")
        steady = EngineConnection(engine, users_server.base_url, KEY, evidence=lambda: "")
        try:
            for turn in range(20):
                name, folder = f"p/m@{turn}", adapters[turn % 3]
                proxy.rate = 0.4
                loaded = await ended(connection.load(name, folder, folder.name), proxy, ArtError)
                there = await steady.adapters()
                assert isinstance(loaded, ArtError) or name in there, proxy.said[-8:]
                listed = await ended(connection.adapters(), proxy, ArtError)
                assert isinstance(listed, ArtError) or listed == there
                said = await ended(connection.complete(canary_request(prompt), name), proxy, ArtError)
                if not isinstance(said, ArtError):
                    token, logprob = first_token(said)
                    true = oracle_for(base).next_logprobs(prompt, folder)[-1]
                    assert logprob == pytest.approx(float(true[token]), abs=1e-3), "it answers as another adapter"
                unloaded = await ended(connection.unload(name), proxy, ArtError)
                assert isinstance(unloaded, ArtError) or name not in await steady.adapters(), proxy.said[-8:]
                proxy.rate = 0.0
                await connection.load(name, folder, folder.name)
                assert name in await steady.adapters()
                await connection.unload(name)
                assert name not in await steady.adapters()
        finally:
            for each in (connection, steady):
                await each.close()
