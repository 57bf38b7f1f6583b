"""Every call of a client whose server, a real `art serve`, errs at random: it ends with its result or with an error in
words, nothing is trained twice or half there, and once the server is well again the same calls work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, TypeVar

import pytest

import art
from art_backend_serverless import ServerlessBackend
from art_conformance.erring_proxy import ErringProxy, Fault
from art_conformance.oracle import agreement, oracle_for
from art_core.errors import ArtError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
HELLO: list[Any] = [{"role": "user", "content": "hello there"}]
# Beyond what the client's own patience allows a call, its training included.
LIMIT_S = 60.0
ROUNDS = 2
RATE = 0.35
ResultT = TypeVar("ResultT")


class Clients:
    """A client past the proxy and one that speaks to the server itself, with a model that both have registered."""

    def __init__(self, url: str, key: str, proxy: ErringProxy, patience: Any, folder: Path) -> None:
        self.proxy, self.folder = proxy, folder
        self.failed: list[ArtError] = []
        self.erring = ServerlessBackend(key, f"{proxy.url}/v1", patience=patience, show_progress=False)
        self.steady = ServerlessBackend(key, url, patience=patience, show_progress=False)

    def model(self, name: str) -> art.TrainableModel:
        return art.TrainableModel(name=name, project="erring", base_model="tiny", base_path=str(self.folder))

    async def ended(self, call: Awaitable[ResultT]) -> ResultT | ArtError:
        """What became of a call: its result, or an error that says why."""
        try:
            async with asyncio.timeout(LIMIT_S):
                return await call
        except Exception as error:
            if not isinstance(error, ArtError) or len(str(error)) < 20:
                said = "\n".join(self.proxy.said[-12:])
                raise AssertionError(f"no error in words but {error!r}, after\n{said}") from error
            self.failed.append(error)
            return error


@pytest.fixture(params=range(2))
async def clients(
    request: pytest.FixtureRequest, own_server: tuple[str, str], patience: Any, tmp_path: Path
) -> AsyncIterator[Clients]:
    url, key = own_server
    async with ErringProxy(url.removesuffix("/v1"), seed=request.param) as proxy:
        made = Clients(url, key, proxy, patience, tmp_path)
        async with made.erring, made.steady:
            yield made
            # All but a few requests can be repeated.
            assert len(made.failed) <= 2, made.failed


async def sampled(backend: ServerlessBackend, model: art.TrainableModel) -> Any:
    """An answer of the model's latest step, as the server itself gives it."""
    registration = await backend.register(model)
    from openai import AsyncOpenAI

    async with AsyncOpenAI(
        base_url=registration.inference_base_url, api_key=registration.inference_api_key, max_retries=0
    ) as client:
        return await client.chat.completions.create(
            messages=HELLO, model=backend.inference_name(model), max_tokens=8, logprobs=True
        )


async def some_groups(backend: ServerlessBackend, model: art.TrainableModel) -> list[art.TrajectoryGroup]:
    answer = await sampled(backend, model)
    return [
        art.TrajectoryGroup(
            art.Trajectory(messages_and_choices=[*HELLO, answer.choices[0]], reward=reward) for reward in (0.0, 1.0)
        )
    ]


def chats() -> list[art.Trajectory]:
    return [art.Trajectory(messages_and_choices=[*HELLO, {"role": "assistant", "content": "good day"}])] * 2


async def test_a_step_is_trained_once_or_not_at_all_and_what_is_served_is_its_weights(
    clients: Clients, own_tiny_model: Path, request: pytest.FixtureRequest
) -> None:
    erring, steady, proxy = clients.erring, clients.steady, clients.proxy
    model = clients.model(f"steps-{proxy_name(request)}")
    await erring.register(model)
    groups = await some_groups(steady, model)
    for turn in range(ROUNDS):
        for teach in (
            lambda: erring.train(model, groups, learning_rate=1e-2),
            lambda: erring.train_sft(model, chats(), learning_rate=1e-2),
        ):
            before = await steady.get_step(model)
            proxy.rate = RATE
            found = await clients.ended(teach())
            proxy.rate = 0.0
            # Jobs of one model are trained one after the other: with this one, those before it are over.
            after = (await steady.train(model, groups, learning_rate=1e-2)).step
            if isinstance(found, ArtError):
                assert after in (before + 1, before + 2), (found, proxy.said)
            else:
                assert found.step == before + 1, proxy.said
                assert after == before + 2, f"the step was trained again: {proxy.said}"
        assert await erring.get_step(model) == after
        proxy.rate = RATE
        target = clients.folder / f"pulled-{turn}"
        pulled = await clients.ended(erring.pull_checkpoint(model, step=after, local_path=target))
        proxy.rate = 0.0
        if isinstance(pulled, ArtError):
            assert not target.exists(), "a part of the checkpoint was left"
            await erring.pull_checkpoint(model, step=after, local_path=target)
        assert not list(clients.folder.glob(".pulled-*")), "something was left beside the checkpoint"
        answer = await sampled(steady, model)
        assert answer.model.endswith(f":step{after}")
        choice = answer.choices[0]
        true = oracle_for(own_tiny_model).logprobs(choice.prompt_token_ids, choice.token_ids, target)
        assert agreement([entry.logprob for entry in choice.logprobs.content], true).mean < 0.05
        assert (await erring.train(model, groups, learning_rate=1e-2)).step == after + 1


async def test_every_other_call_is_done_or_not_and_says_so(clients: Clients, request: pytest.FixtureRequest) -> None:
    erring, steady, proxy = clients.erring, clients.steady, clients.proxy
    model = clients.model(f"calls-{proxy_name(request)}")
    await steady.register(model)
    proxy.rate = RATE
    while isinstance(found := await clients.ended(erring.register(model)), ArtError):
        assert proxy.said, found
    groups = await some_groups(steady, model)
    for turn in range(ROUNDS):
        proxy.rate = 0.0
        await erring.train(model, groups, learning_rate=1e-2)
        there = await steady.list_steps(model)
        proxy.rate = RATE
        assert await clients.ended(erring.register(model))
        for asked, right in (
            (erring.get_step(model), there[-1]),
            (erring.list_steps(model), there),
            (leased(erring, model, there[0]), steady.inference_name(model, there[0])),
            (erring.log_trajectories(model, groups, "train"), None),
        ):
            said: Any = await clients.ended(asked)
            assert isinstance(said, ArtError) or said == right, proxy.said
        deleted = await clients.ended(erring.delete_checkpoints(model, there[:1]))
        left = await steady.list_steps(model)
        if isinstance(deleted, ArtError):
            assert left in (there, there[1:]), deleted
        else:
            assert (deleted, left) == (there[:1], there[1:])
        fork = clients.model(f"fork-{proxy_name(request)}-{turn}")
        begun = await clients.ended(erring.register(fork))
        forked = begun if isinstance(begun, ArtError) else await clients.ended(erring.fork_checkpoint(fork, model.name))
        proxy.rate = 0.0
        await erring.register(fork)
        if isinstance(forked, ArtError):
            assert await erring.get_step(fork) in (0, there[-1]), forked
        else:
            assert forked == there[-1] == await erring.get_step(fork)
        proxy.rate = RATE
        gone = await clients.ended(erring.delete_model(fork))
        proxy.rate = 0.0
        if isinstance(gone, ArtError):
            await erring.register(fork)
            await erring.delete_model(fork)
        await erring.register(fork)
        assert await erring.list_steps(fork) == [0], "the model was not deleted"
        # All of it once more, from a server that is well.
        assert await erring.get_step(model) == there[-1]
        assert await erring.fork_checkpoint(fork, model.name) == there[-1]
        await erring.log_trajectories(model, groups, "train")
        await erring.delete_model(fork)


async def test_a_file_is_pulled_whatever_becomes_of_each_request_for_it(
    own_server: tuple[str, str], patience: Any, tmp_path: Path
) -> None:
    url, key = own_server
    async with (
        ErringProxy(url.removesuffix("/v1"), seed=1, errs_at=lambda _, path: "/blobs/" in path) as proxy,
        ServerlessBackend(key, f"{proxy.url}/v1", patience=patience, show_progress=False) as backend,
    ):
        model = art.TrainableModel(name="blobs", project="erring", base_model="tiny", base_path=str(tmp_path))
        await model.register(backend)
        proxy.rate = 0.4
        for turn in range(4):
            await backend.pull_checkpoint(model, step=0, local_path=tmp_path / f"pulled-{turn}")
    refused = (Fault.NOT_TAKEN, Fault.BROKEN, Fault.GATEWAY)
    assert any(said.endswith(fault.value) for said in proxy.said for fault in refused), proxy.said


async def leased(backend: ServerlessBackend, model: art.TrainableModel, step: int) -> str:
    """The name under which a lease gives a step."""
    async with backend.lease(model, step) as name:
        return name


def proxy_name(request: pytest.FixtureRequest) -> str:
    """A word for the seed of this test, since all tests share one server."""
    return request.node.callspec.id
