"""An endpoint on this machine between an agent that holds its own OpenAI client and a model's endpoint.

It passes chat completions on with the model's client and keeps each choice as it was sampled, token ids and logprobs
included, under the session that asked. Knows the OpenAI wire; knows no environment, no trajectory and no reward.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import openai
from aiohttp import web
from openai.types.chat import ChatCompletion

from .conversations import Exchange

SESSION_HEADER = "X-Session-ID"
KEY_HEADER = "X-ART-Recorder-Key"
_LARGEST_BODY = 256 * 2**20
_WAITING = 4096
_OF_TRAINING = ("token_ids", "prompt_token_ids", "policy_version")


@dataclass
class CompletionRecorder:
    """Listens on 127.0.0.1 while it is entered; only who sends `headers` is answered."""

    headers: dict[str, str] = field(default_factory=lambda: {KEY_HEADER: secrets.token_urlsafe(24)}, repr=False)
    _clients: list[openai.AsyncOpenAI] = field(default_factory=list, init=False, repr=False)
    _sessions: dict[str, list[Exchange]] = field(default_factory=dict, init=False, repr=False)
    _runner: web.AppRunner | None = field(default=None, init=False, repr=False)
    _address: str = field(default="", init=False)

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=_LARGEST_BODY)
        app.router.add_post("/{client}/v1/chat/completions", self._complete)
        app.router.add_get("/{client}/v1/models", self._models)
        app.router.add_route("*", "/{path:.*}", _not_spoken)
        # Who goes away while a model answers leaves no request behind.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=5.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, backlog=_WAITING).start()
        host, port = self._runner.addresses[0][:2]
        self._address = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        self._runner = None
        self._clients.clear()
        self._sessions.clear()

    def base_url(self, client: openai.AsyncOpenAI) -> str:
        """The address under which `client` is asked; the same one for the same client."""
        number = next((n for n, known in enumerate(self._clients) if known is client), len(self._clients))
        if number == len(self._clients):
            self._clients.append(client)
        return f"{self._address}/{number}/v1"

    def open(self, session: str) -> None:
        """Keep what this session asks from now on."""
        self._sessions.setdefault(session, [])

    def close(self, session: str) -> list[Exchange]:
        """What the session asked and was answered, in the order of the answers. What it asks later isn't kept."""
        return self._sessions.pop(session, [])

    def _client(self, request: web.Request) -> openai.AsyncOpenAI | None:
        given, number = request.headers.get(KEY_HEADER, ""), request.match_info["client"]
        if not secrets.compare_digest(given.encode(), self.headers[KEY_HEADER].encode()):
            return None
        return self._clients[int(number)] if number.isdecimal() and int(number) < len(self._clients) else None

    async def _complete(self, request: web.Request) -> web.Response:
        client = self._client(request)
        if client is None:
            return _error(401, "this endpoint is for the environment that opened it")
        try:
            body = json.loads(await request.read())
            messages, model = body.pop("messages"), body.pop("model")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return _error(400, f"a chat completion is a JSON object with messages and a model: {error!r}")
        # A choice is known exactly when it is whole; who asked for a stream gets it as one piece.
        streamed = body.pop("stream", False)
        body.pop("stream_options", None)
        try:
            completion = await client.chat.completions.create(messages=messages, model=model, extra_body=body)
        except openai.APIStatusError as error:
            return web.Response(status=error.status_code, body=error.response.content, content_type="application/json")
        except openai.APITimeoutError as error:
            return _error(504, str(error))
        except openai.APIConnectionError as error:
            return _error(503, f"{error} ({error.__cause__})")
        self._keep(request.headers.get(SESSION_HEADER, ""), messages, body.get("tools"), completion)
        answer = _for_the_agent(completion, with_logprobs=bool(body.get("logprobs")))
        if not streamed:
            return web.json_response(answer)
        return web.Response(body=b"".join(_events(answer)), content_type="text/event-stream")

    def _keep(self, session: str, messages: Any, tools: Any, completion: ChatCompletion) -> None:
        if (kept := self._sessions.get(session)) is not None:
            kept += [Exchange(messages, tools or None, choice) for choice in completion.choices]

    async def _models(self, request: web.Request) -> web.Response:
        client = self._client(request)
        if client is None:
            return _error(401, "this endpoint is for the environment that opened it")
        try:
            async with asyncio.timeout(30):
                listed = await client.models.list()
        except (openai.APIError, TimeoutError) as error:
            return _error(503, str(error) or "the model's endpoint didn't list its models in 30 s")
        return web.json_response({"object": "list", "data": [model.model_dump(mode="json") for model in listed.data]})


async def _not_spoken(request: web.Request) -> web.Response:
    return _error(
        404,
        f"{request.method} {request.path} isn't answered here: ART's models answer chat completions. Choose an agent"
        " program that asks for those; one that speaks the Responses or the Anthropic API can't be trained on.",
    )


def _for_the_agent(completion: ChatCompletion, *, with_logprobs: bool) -> dict[str, Any]:
    """What an agent expects; of what training needs, it gets nothing that it didn't ask for."""
    answer = completion.model_dump(mode="json", exclude_unset=True, warnings=False)
    for choice in answer["choices"]:
        for name in (*_OF_TRAINING, *(() if with_logprobs else ("logprobs",))):
            choice.pop(name, None)
    return answer


def _events(answer: dict[str, Any]) -> Iterator[bytes]:
    head = {name: value for name, value in answer.items() if name not in ("choices", "usage")}
    head["object"] = "chat.completion.chunk"
    for choice in answer["choices"]:
        delta = dict(choice["message"])
        if delta.get("tool_calls"):
            delta["tool_calls"] = [{**call, "index": index} for index, call in enumerate(delta["tool_calls"])]
        piece = {**{name: value for name, value in choice.items() if name != "message"}, "delta": delta}
        yield f"data: {json.dumps({**head, 'choices': [piece]})}\n\n".encode()
    yield f"data: {json.dumps({**head, 'choices': [], 'usage': answer.get('usage')})}\n\n".encode()
    yield b"data: [DONE]\n\n"


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "art_recorder", "code": status}}, status=status)
