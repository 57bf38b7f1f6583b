"""An OpenAI-compatible endpoint that answers as the gateway does, for tests of environments."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import art

MADE = str(Path(__file__).with_name("made"))
Say = Callable[[dict[str, Any]], dict[str, Any]]


def pytest_configure() -> None:
    # Tasksets are found by the name of their module.
    if find_spec("verifiers") and MADE not in sys.path:
        sys.path.insert(0, MADE)


def said(content: str, **more: Any) -> dict[str, Any]:
    """A choice of the gateway; one id a character of what was said, none of it what a tokenizer would give."""
    return {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": content, **more},
        "logprobs": {"content": [{"token": c, "bytes": None, "logprob": -0.5, "top_logprobs": []} for c in content]},
        "token_ids": [1000 + ord(c) for c in content],
        "policy_version": 3,
    }


@dataclass
class Endpoint:
    """Keeps each request; `say` makes the choice that answers it."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    say: Say = lambda body: said(f"reply to {len(body['messages'])}")
    before: Callable[[], Awaitable[None]] | None = None
    refuses: int = 0
    gone: int = 0

    async def complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append({**body, "authorization": request.headers["Authorization"]})
        if self.refuses:
            return web.json_response({"error": {"message": "the prompt is too long"}}, status=self.refuses)
        if self.before is not None:
            try:
                await self.before()
            except asyncio.CancelledError:
                self.gone += 1
                raise
        prompt = [ord(c) for c in str(body["messages"])]
        choice = {**self.say(body), "prompt_token_ids": prompt}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": 1, "total_tokens": len(prompt) + 1}
        head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"]}
        return web.json_response({**head, "choices": [choice], "usage": usage})

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "agent", "object": "model", "created": 1}]})


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    served = Endpoint()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", served.complete)
    app.router.add_get("/v1/models", served.models)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    served.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield served
    await runner.cleanup()


@pytest.fixture
def model(endpoint: Endpoint) -> art.Model:
    return art.Model(
        name="agent", project="environments", inference_base_url=endpoint.url, inference_api_key="sk-endpoint"
    )


@pytest.fixture
def make_said() -> Callable[..., dict[str, Any]]:
    return said
