"""What the gateway's tests run against: a real HTTP server that speaks vLLM's surface with answers that are known.

The real engines are tested behind the gateway in the conformance suite; here it is the gateway alone that is looked at,
so its upstream must be able to fail, stall and vanish on demand.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route as Address

from art_core import InferenceCapability, InferenceLaunch, LaunchPlan, ModelKey, inference_name
from art_core.errors import CheckpointNotFound
from art_core.names import adapter_name, parse_inference_name
from art_engine_kit.openai_server import OpenAIServerEngine
from art_engine_kit.served_steps import ServedSteps
from art_gateway import SERVER_OPTIONS, GatewayLimits, Route, RouteUnavailable, ServedModel, create_app

API_KEY = "the-users-key"
ENGINE_KEY = "the-engines-key"
PROMPT_IDS = [11, 12, 13]
Behaviour = Callable[[dict[str, Any]], Any]


class VllmDialect(OpenAIServerEngine):
    """vLLM's dialect, as the gateway's neighbour would ship it: prompt ids are at the top of a chat answer."""

    name = "surface"
    capabilities = frozenset({InferenceCapability.STREAMING_TOKEN_IDS, InferenceCapability.TOOL_CALLS})

    def launch(self, config: InferenceLaunch) -> LaunchPlan:
        return LaunchPlan(argv=(config.python,))


class Upstream:
    """The server behind the gateway. `behave(request)` gives a Response in place of the usual answer."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.behave: Behaviour | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.arrived = asyncio.Semaphore(0)
        self.gone = asyncio.Event()
        self.app = Starlette(
            routes=[
                Address("/v1/chat/completions", self.answer, methods=["POST"]),
                Address("/v1/completions", self.answer, methods=["POST"]),
            ]
        )

    async def answer(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {ENGINE_KEY}":
            return JSONResponse({"error": {"message": "no"}}, 401)
        body = await request.json()
        self.requests.append(body)
        self.arrived.release()
        if self.behave is not None:
            answer = self.behave(body)
            return await answer if inspect.isawaitable(answer) else answer
        if body.get("stream"):
            return StreamingResponse(self.stream(body), media_type="text/event-stream")
        waiting = asyncio.create_task(self.gate.wait())
        try:
            while not waiting.done():
                await asyncio.wait({waiting}, timeout=0.02)
                if await request.is_disconnected():
                    self.gone.set()
                    return Response(status_code=499)
        finally:
            waiting.cancel()
        return JSONResponse(chat_answer(body))

    async def hold(self, body: dict[str, Any]) -> Response:
        """Answer once the gate is open, without looking whether the client is still there."""
        await self.gate.wait()
        return JSONResponse(chat_answer(body))

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        try:
            for i, word in enumerate(["The ", "answer ", "is ", "42."]):
                chunk = stream_chunk(body, i, word)
                yield f"data: {json.dumps(chunk)}\n\n"
                await self.gate.wait()
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.gone.set()
            raise


def chat_answer(body: dict[str, Any]) -> dict[str, Any]:
    """A whole answer that says in its text which adapter it was asked for."""
    choice = {
        "message": {"role": "assistant", "content": body["model"]},
        "finish_reason": "stop",
        "token_ids": [1, 2],
        "logprobs": {"content": [{"token": "a", "logprob": -0.5, "bytes": None, "top_logprobs": []}] * 2},
    }
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": i, **choice} for i in range(body.get("n") or 1)],
        "prompt_token_ids": PROMPT_IDS,
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def stream_chunk(body: dict[str, Any], i: int, word: str) -> dict[str, Any]:
    """Chunk `i` of a streamed answer; the first has the prompt's ids at its top."""
    chunk = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None, "token_ids": [i]}],
    }
    return {**chunk, "prompt_token_ids": PROMPT_IDS} if i == 0 else chunk


@dataclass
class TableRoutes:
    """Routes held in a table, moved by the test; counts are kept by the kernel's own `ServedSteps`."""

    upstream_url: str
    models: dict[ModelKey, ServedSteps] = field(default_factory=dict)
    down: RouteUnavailable | None = None
    wait: asyncio.Event | None = None
    released: list[int] = field(default_factory=list)
    unreachable: int = 0
    template_arguments: dict[str, Any] = field(default_factory=dict)

    def publish(self, project: str, name: str, step: int) -> ServedSteps:
        key = ModelKey(project, name)
        served = self.models.setdefault(key, ServedSteps(key))
        served.add(step)
        served.route(step)
        return served

    async def acquire(self, project: str, requested_name: str) -> Route:
        name, step = parse_inference_name(requested_name)
        key = ModelKey(project, name)
        if key not in self.models:
            raise CheckpointNotFound(f"{key} is not served")
        if self.down is not None:
            raise self.down
        if self.wait is not None:
            await self.wait.wait()
        served = self.models[key]
        pinned = served.acquire(step)

        def release() -> None:
            self.released.append(pinned)
            served.release(pinned)

        def unreachable() -> None:
            self.unreachable += 1

        return Route(
            upstream_url=self.upstream_url,
            upstream_key=ENGINE_KEY,
            engine=VllmDialect(),
            adapter=adapter_name(key, pinned),
            name=inference_name(name, pinned),
            step=pinned,
            template_arguments=self.template_arguments,
            release=release,
            unreachable=unreachable,
        )

    def projects_of(self, name: str) -> Collection[str]:
        return [key.project for key in self.models if key.name == name]

    def served(self, project: str | None) -> Sequence[ServedModel]:
        return [
            ServedModel(project=key.project, name=key.name, step=served.routed or 0, steps=tuple(sorted(served.loaded)))
            for key, served in self.models.items()
            if project in (None, key.project)
        ]

    @property
    def in_flight(self) -> int:
        return sum(served.in_flight(step) for served in self.models.values() for step in served.loaded)


class Server(uvicorn.Server):
    """One of several in a process, whose signals stay with the tests."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serving(*apps: Any) -> AsyncIterator[list[str]]:
    """Run applications under uvicorn, set up as a host does, each on a port of its own; gives their addresses."""
    listeners = [socket.socket() for _ in apps]
    servers: list[Server] = []
    for app, listener in zip(apps, listeners, strict=True):
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, **{**SERVER_OPTIONS, "loop": "none", "timeout_graceful_shutdown": 1})
        servers.append(Server(config))
    running = [
        asyncio.create_task(server.serve([listener])) for server, listener in zip(servers, listeners, strict=True)
    ]
    try:
        while not all(server.started for server in servers):
            await asyncio.sleep(0.005)
        yield [f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
    finally:
        for server in servers:
            server.should_exit = True
        async with asyncio.timeout(20):
            await asyncio.gather(*running)


@dataclass
class Stage:
    """A gateway with its upstream, its routes, and a client that has the key."""

    url: str
    upstream: Upstream
    routes: TableRoutes
    client: aiohttp.ClientSession

    async def chat(self, model: str = "agent", project: str | None = "p", **fields: Any) -> tuple[int, Any, Any]:
        """Ask, and give the status, the JSON body and the headers."""
        prefix = "" if project is None else f"/{project}"
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}
        async with self.client.post(f"{self.url}{prefix}/v1/chat/completions", json=body) as answer:
            return answer.status, await answer.json(), answer.headers

    async def settled(self) -> None:
        """Wait until nothing is in flight."""
        async with asyncio.timeout(10):
            while self.routes.in_flight:
                await asyncio.sleep(0.01)


@pytest.fixture
def limits() -> GatewayLimits:
    return GatewayLimits(request_bytes=2**20, request_s=60, route_s=60, connect_s=60, answer_s=120)


@pytest.fixture
async def stage(limits: GatewayLimits) -> AsyncIterator[Stage]:
    upstream = Upstream()
    routes = TableRoutes("")
    routes.publish("p", "agent", 3)
    headers = {"Authorization": f"Bearer {API_KEY}"}
    gateway = create_app(routes, api_key=API_KEY, limits=limits)
    async with serving(upstream.app, gateway) as (upstream_url, url):
        routes.upstream_url = upstream_url
        async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as client:
            yield Stage(url, upstream, routes, client)
            upstream.gate.set()
