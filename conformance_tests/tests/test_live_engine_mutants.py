"""For the checks of a running inference server, an engine that breaks each: the torch engine, spoiled in one place.

The mutants speak to one sound server through a dialect that lies, forgets or mixes things up, as a careless engine
would.
"""

from __future__ import annotations

import copy
import inspect
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from art_conformance import InferenceEngineConformance
from art_conformance.live_engine_suite import IDENTITY, ONE, TWO
from art_conformance.oracle import oracle_for
from art_conformance.requirements import checks_of
from art_conformance.serving import LiveEngine, port_for_a_server, start_engine
from art_conformance.tiny_model import write_adapter
from art_core import ArtError, EngineCall, InferenceLaunch, installed_plugins
from art_core.registry import instantiate

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.asyncio(loop_scope="module")]
KEY = "sk-mutants-0123456789"


class Honest:
    """The torch engine's dialect, passed through; a mutant changes one method."""

    def __init__(self) -> None:
        self.inner: Any = instantiate(installed_plugins().inference_engine("torch"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def prepare_request(self, endpoint: Any, body: Any, adapter: Any) -> Any:
        return self.inner.prepare_request(endpoint, body, adapter)

    def read_response(self, endpoint: Any, body: Any) -> Any:
        return self.inner.read_response(endpoint, body)


def changing_choices(change: Any) -> type[Honest]:
    """An engine whose answers are changed, choice by choice, after it has read them."""

    class Mutant(Honest):
        def read_response(self, endpoint: Any, body: Any) -> Any:
            answer = copy.deepcopy(super().read_response(endpoint, body))
            for choice in answer["choices"]:
                change(choice)
            return answer

    return Mutant


def changing_requests(change: Any) -> type[Honest]:
    """An engine whose requests are changed after they are prepared; `change(request, adapter)`."""

    class Mutant(Honest):
        def prepare_request(self, endpoint: Any, body: Any, adapter: Any) -> Any:
            request = copy.deepcopy(super().prepare_request(endpoint, body, adapter))
            change(request, adapter)
            return request

    return Mutant


def _shift_logprobs(choice: Any) -> None:
    for entry in (choice["logprobs"] or {}).get("content") or ():
        entry["logprob"] -= 0.3


def _shift_ids(choice: Any) -> None:
    choice["token_ids"] = [(token + 1) % 300 for token in choice["token_ids"]]


def _longer_prompt(choice: Any) -> None:
    choice["prompt_token_ids"] = [1, *choice["prompt_token_ids"]]


def _always_first(request: Any, adapter: Any) -> None:
    if adapter in (TWO, IDENTITY, None):
        request["model"] = ONE


def _base_for_unknown(request: Any, adapter: Any) -> None:
    if adapter == "conformance/never@9":
        request["model"] = "base-model"


def _base_for_unloaded(request: Any, adapter: Any) -> None:
    if adapter == "conformance/gone@1" and request.get("max_tokens", 0) > 1:
        request["model"] = "base-model"


def _without(*names: str) -> Any:
    def change(request: Any, adapter: Any) -> None:
        for name in names:
            request.pop(name, None)

    return change


def _sampled(request: Any, adapter: Any) -> None:
    request["temperature"] = 1.5


def _scaled(choice: Any) -> None:
    for entry in (choice["logprobs"] or {}).get("content") or ():
        entry["logprob"] *= 2.0


class ForgetsUnload(Honest):
    def unload_adapter(self, adapter: str) -> EngineCall:
        return EngineCall(method="GET", path="/v1/models", action="unload")


class NeverRefuses(Honest):
    def check_answer(self, call: Any, status: int, body: bytes) -> None:
        return None


class OneNameForAll(Honest):
    """Every version of a model goes under one name in the engine, so a load replaces weights in flight or fails."""

    def load_adapter(self, adapter: str, folder: Path) -> Any:
        return self.inner.load_adapter(adapter.partition("@")[0], folder)

    def unload_adapter(self, adapter: str) -> Any:
        return self.inner.unload_adapter(adapter.partition("@")[0])

    def prepare_request(self, endpoint: Any, body: Any, adapter: Any) -> Any:
        return self.inner.prepare_request(endpoint, body, adapter and adapter.partition("@")[0])


class LoadsTheFirst(Honest):
    """Whatever is loaded, the first adapter's weights are."""

    def load_adapter(self, adapter: str, folder: Path) -> Any:
        return self.inner.load_adapter(adapter, folder.with_name("one") if folder.name == "two" else folder)


class PauseDoesNothing(Honest):
    def pause(self) -> EngineCall:
        return EngineCall(method="GET", path="/health", action="pause")

    resume = pause


class ChunksWithoutIds(Honest):
    def read_chunk(self, endpoint: Any, chunk: Any) -> Any:
        chunk = self.inner.read_chunk(endpoint, chunk)
        return {**chunk, "choices": [{**choice, "token_ids": []} for choice in chunk["choices"]]}


MUTANTS: dict[str, tuple[str, type[Honest]]] = {
    "INF-103": ("unloading is forgotten", ForgetsUnload),
    "INF-104": ("every name is answered by one adapter", changing_requests(_always_first)),
    "INF-105": ("logprobs are off by 0.3", changing_choices(_shift_logprobs)),
    "INF-106": ("logprobs are scaled", changing_choices(_scaled)),
    "INF-107": ("the prompt has a token too many", changing_choices(_longer_prompt)),
    "INF-108": ("ids are shifted by one", changing_choices(_shift_ids)),
    "INF-109": ("n is dropped", changing_requests(_without("n"))),
    "INF-110": ("the seed is dropped", changing_requests(_without("seed"))),
    "INF-111": ("stops are dropped", changing_requests(_without("stop"))),
    "INF-112": ("max_tokens is dropped", changing_requests(_without("max_tokens"))),
    "INF-113": ("temperature 0 is not obeyed", changing_requests(_sampled)),
    "INF-114": ("the prompt of a completion is changed", changing_choices(_longer_prompt)),
    "INF-115": ("the identity is answered by another adapter", changing_requests(_always_first)),
    "INF-116": ("chunks come without ids", ChunksWithoutIds),
    "INF-117": ("tools are dropped", changing_requests(_without("tools"))),
    "INF-118": ("tools are dropped", changing_requests(_without("tools"))),
    "INF-120": ("the base model answers for an unknown adapter", changing_requests(_base_for_unknown)),
    "INF-121": ("the base model answers for an unloaded adapter", changing_requests(_base_for_unloaded)),
    "INF-122": ("refusals are overlooked", NeverRefuses),
    "INF-124": ("versions share one name", OneNameForAll),
    "INF-125": ("new versions get the old weights", LoadsTheFirst),
    "INF-130": ("pausing does nothing", PauseDoesNothing),
    "INF-132": ("the base model is answered by an adapter", changing_requests(_always_first)),
}
# What no lie of a dialect can break: the server's own behaviour, shown to fail in other ways or not at all.
WITHOUT_MUTANT = {
    "INF-101": "the plain health of a server; without it no check runs",
    "INF-102": "test_an_open_server_is_noticed",
    "INF-123": "needs a server that replaces weights under a name",
    "INF-126": "needs a server that takes any length",
    "INF-127": "needs a server that takes anything",
    "INF-128": "needs a server that dies when a client leaves",
    "INF-131": "needs a server that loses adapters in its sleep",
    "INF-140": "test_a_key_in_the_log_is_noticed",
    "INF-141": "needs a server that ignores SIGTERM",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory, own_tiny_model: Path) -> AsyncIterator[LiveEngine]:
    root = tmp_path_factory.mktemp("mutants")
    launch = InferenceLaunch(
        base_model=own_tiny_model,
        served_name="base-model",
        host="127.0.0.1",
        port=port_for_a_server(),
        api_key=KEY,
        python=sys.executable,
        max_adapters=16,
        dtype="float32",
    )
    for name, seed, strength in (("one", 11, 0.5), ("two", 12, 0.5), ("identity", 13, 0.0)):
        write_adapter(root / name, own_tiny_model, seed=seed, strength=strength)
    live = await start_engine(Honest(), launch, root / "server.log")
    for name, folder in adapters_of(root).items():
        await live.load(name, folder)
    yield live
    await live.close()


def adapters_of(root: Path) -> dict[str, Path]:
    return {ONE: root / "one", TWO: root / "two", IDENTITY: root / "identity"}


async def run_check(id: str, live: LiveEngine, tmp_path: Path) -> None:
    """Call the method that checks `id` with what its parameters ask for."""
    name = next(name for name, _, requirement in checks_of(InferenceEngineConformance) if requirement.id == id)
    method = getattr(InferenceEngineConformance(), name)
    there = {
        "live": live,
        "adapters": adapters_of(live.process.log_file.parent),
        "oracle": oracle_for(live.launch.base_model),
        "conformance_model": live.launch.base_model,
        "own_tiny_model": live.launch.base_model,
        "tmp_path": tmp_path,
    }
    await method(**{parameter: there[parameter] for parameter in inspect.signature(method).parameters})


async def clean_up(live: LiveEngine) -> None:
    """Leave the server as it was, whatever a mutant's check loaded or unloaded."""
    honest = Honest()
    sound = replace_engine(live, honest)
    wanted = adapters_of(live.process.log_file.parent)
    for name in await sound.adapters() - wanted.keys():
        await sound.unload(name)
    for name in wanted.keys() - await sound.adapters():
        await sound.load(name, wanted[name])


def replace_engine(live: LiveEngine, engine: Any) -> LiveEngine:
    return replace(live, engine=engine)


@pytest.mark.parametrize("id", MUTANTS)
async def test_the_check_notices(id: str, server: LiveEngine, tmp_path: Path) -> None:
    _, mutant = MUTANTS[id]
    try:
        with pytest.raises((AssertionError, ArtError, pytest.fail.Exception)):
            await run_check(id, replace_engine(server, mutant()), tmp_path)
    finally:
        await clean_up(server)


@pytest.mark.parametrize("id", ["INF-124", "INF-128", "INF-130"])
async def test_a_check_of_what_is_under_way_is_not_met_when_nothing_is(
    id: str, server: LiveEngine, tmp_path: Path
) -> None:
    answers_at_once = changing_requests(lambda request, _: request.update(max_tokens=1))
    try:
        with pytest.raises(AssertionError, match="it shows nothing"):
            await run_check(id, replace_engine(server, answers_at_once()), tmp_path)
    finally:
        await clean_up(server)


@pytest.mark.parametrize("id", MUTANTS)
async def test_the_check_is_met_by_the_sound_engine(id: str, server: LiveEngine, tmp_path: Path) -> None:
    try:
        await run_check(id, server, tmp_path)
    finally:
        await clean_up(server)


async def test_an_open_server_is_noticed(server: LiveEngine, tmp_path: Path) -> None:
    class WithKey(httpx.AsyncBaseTransport):
        """What a server does that asks for no key: it treats every request as if it had the right one."""

        def __init__(self) -> None:
            self.inner = httpx.AsyncHTTPTransport()

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            request.headers["Authorization"] = f"Bearer {KEY}"
            return await self.inner.handle_async_request(request)

    async with httpx.AsyncClient(base_url=server.client.base_url, transport=WithKey()) as client:
        with pytest.raises(AssertionError):
            await run_check("INF-102", replace(server, client=client), tmp_path)
    await clean_up(server)


async def test_a_key_in_the_log_is_noticed(server: LiveEngine, tmp_path: Path) -> None:
    from art_conformance.dialect_checks import KEY as suites_key

    with server.process.log_file.open("a") as log:
        log.write(json.dumps({"key": suites_key}) + "\n")
    with pytest.raises(AssertionError):
        await run_check("INF-140", server, tmp_path)


async def test_every_live_check_has_a_mutant_or_a_reason() -> None:
    live = {requirement.id for _, _, requirement in checks_of(InferenceEngineConformance) if requirement.live}
    assert live == MUTANTS.keys() | WITHOUT_MUTANT.keys()
    assert not MUTANTS.keys() & WITHOUT_MUTANT.keys()
