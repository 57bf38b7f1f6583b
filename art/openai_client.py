"""The OpenAI client that a model hands out: the openai package's own, made to hold thousands of requests at once.

The package spends a millisecond or more of the event loop on each chat completion (it walks the messages' types, builds
an httpx request and constructs the answer in Python). The plain case, a dictionary in and a ChatCompletion out, is
done here directly; whatever is not plain (streams, extra headers, a proxy, a status to retry) goes the package's way,
over its aiohttp transport. Knows the openai package in its versions 2 and 3; knows nothing of models or trajectories.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Self
from urllib.parse import urlsplit

import openai
from openai.resources.chat import AsyncChat
from openai.resources.chat.completions import AsyncCompletions
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ValidationError

from .first_answer import FirstAnswer
from .http_client import AnyLoopClient, httpx
from .keep_alive import Answer, KeepAlivePool
from .pinned_step import pinned_name

REQUEST_TIMEOUT_S = 1200.0
CONNECT_TIMEOUT_S = 5.0
USUAL_WAIT_S = 0.5
LONGEST_WAIT_S = 60.0
_UNDERSTOOD = inspect.signature(AsyncCompletions.create).parameters.keys() - {
    "self",
    "extra_headers",
    "extra_query",
    "timeout",
}
_ABSENT: tuple[type, ...] = tuple(
    kind for kind in (getattr(openai, name, None) for name in ("NotGiven", "Omit")) if kind is not None
)
_RETRIED_STATUSES = frozenset({408, 409, 429})


def make_openai_client(
    *, base_url: str, api_key: str, served_as: Mapping[str, str] | None = None
) -> openai.AsyncOpenAI:
    """A client for any OpenAI-compatible endpoint, to be used on any event loop.

    A request may take 1200 s, connecting 5 s. Requests beyond what files may be open, or beyond 100,000, wait for those
    before them. `served_as` are names of models for which the endpoint has others.
    """
    client = _ManyRequestsClient(
        base_url=base_url,
        api_key=api_key,
        timeout=openai.Timeout(REQUEST_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        http_client=AnyLoopClient(),
    )
    client.served_as = served_as or {}
    return client


@dataclass(frozen=True, slots=True)
class _Plain:
    """How plain requests are sent, for as long as the event loop, the client's address and its key stay the same."""

    loop: asyncio.AbstractEventLoop
    address: object
    key: str
    request: tuple[KeepAlivePool, bytes] | None


class _ManyRequestsClient(openai.AsyncOpenAI):
    _plain: _Plain | None = None
    served_as: Mapping[str, str] = MappingProxyType({})

    @cached_property
    def first_answer(self) -> FirstAnswer:
        """Whether anything has been answered yet."""
        return FirstAnswer()

    @cached_property
    def chat(self) -> AsyncChat:
        return _Chat(self)

    def pinned(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters of a request, for the step that is held for this rollout where one is, and else under the
        endpoint's own name for the model.
        """
        model = params.get("model")
        if not isinstance(model, str):
            return params
        name = pinned_name(str(self.base_url), model) or self.served_as.get(model, model)
        return params if name == model else {**params, "model": name}

    def copy(self, **changes: Any) -> Self:
        """As the openai package documents it; a copy knows the same names."""
        made = super().copy(**changes)
        made.served_as = self.served_as
        made.first_answer = self.first_answer
        return made

    with_options = copy

    async def _prepare_options(self, options: Any) -> Any:
        """What doesn't come through `chat.completions.create`, such as responses and parsed completions."""
        if isinstance(options.json_data, dict):
            options.json_data = self.pinned(options.json_data)
        return await super()._prepare_options(options)

    async def plain_request(self) -> tuple[KeepAlivePool, bytes] | None:
        """The connections for a plain chat completion and the head of its request; None when it can't be plain."""
        transport, address, key, loop = self._client, self.base_url, self.api_key, asyncio.get_running_loop()
        plain = self._plain
        if plain is None or plain.loop is not loop or plain.address is not address or plain.key != key:
            pool = None
            # Without a key of its own, the client asks a function for one at each request.
            if isinstance(transport, AnyLoopClient) and key and self.max_retries >= 1 and not self.default_query:
                pool = (await transport.of_loop()).pool(str(address))
            head = self._request_head(str(address)) if pool is not None else b""
            plain = self._plain = _Plain(loop, address, key, None if pool is None else (pool, head))
        return plain.request

    def _request_head(self, base_url: str) -> bytes:
        address = urlsplit(base_url)
        headers = {
            name.lower(): value
            for name, value in {**self.default_headers, **self.auth_headers}.items()
            if isinstance(value, str)
        }
        headers |= {"host": address.netloc, "accept-encoding": "identity", "content-type": "application/json"}
        if any(set("\r\n") & set(name + value) for name, value in headers.items()):
            raise ValueError("a header of this client holds a line break")
        lines = [f"POST {address.path.rstrip('/')}/chat/completions HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return ("\r\n".join(lines) + "\r\n").encode("latin-1")

    def limits(self) -> tuple[float | None, float | None]:
        """Seconds to connect and to answer."""
        timeout = self.timeout
        if timeout is None or isinstance(timeout, float | int):
            return timeout, timeout
        return timeout.connect, timeout.read


class _Chat(AsyncChat):
    @cached_property
    def completions(self) -> AsyncCompletions:
        return _Completions(self._client)


class _Completions(AsyncCompletions):
    _client: _ManyRequestsClient

    async def create(self, **params: Any) -> Any:
        """As the openai package documents it; takes the short way when the request is plain."""
        client = self._client
        params = client.pinned(params)
        with client.first_answer.awaited(str(client.base_url), params.get("model"), client.limits()[1]):
            return await self._create(params)

    async def _create(self, params: dict[str, Any]) -> Any:
        client = self._client
        plain = await client.plain_request()
        body = _encode(params) if plain is not None else None
        if plain is None or body is None:
            return await super().create(**params)
        pool, head = plain
        connect_s, answer_s = client.limits()
        try:
            answer = await pool.post(head, body, connect_s=connect_s, answer_s=answer_s)
        except OSError:
            return await self._again(params)
        if 200 <= answer.status < 300 and "content-encoding" not in answer.headers:
            return _read_completion(answer)
        if 400 <= answer.status < 500 and answer.status not in _RETRIED_STATUSES:
            response = httpx.Response(
                answer.status,
                headers=answer.headers,
                content=answer.body,
                request=httpx.Request("POST", f"{str(client.base_url).rstrip('/')}/chat/completions"),
            )
            raise client._make_status_error_from_response(response)
        await asyncio.sleep(_wait_s(answer))
        return await self._again(params)

    async def _again(self, params: dict[str, Any]) -> Any:
        """The package's own way, with its waits between attempts and its errors; one attempt was ours."""
        client = self._client.with_options(max_retries=self._client.max_retries - 1)
        return await AsyncCompletions(client).create(**params)


def _encode(params: dict[str, Any]) -> bytes | None:
    """The request's body, or None when the arguments are not plain JSON and only the package knows what to do."""
    if not params.keys() <= _UNDERSTOOD or "messages" not in params or "model" not in params:
        return None
    body = {name: value for name, value in params.items() if not isinstance(value, _ABSENT)}
    if body.get("stream"):
        return None
    extra = body.pop("extra_body", None)
    if extra is not None:
        if not isinstance(extra, dict):
            return None
        body |= extra
    try:
        return json.dumps(
            body, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_message_fields
        ).encode()
    except (TypeError, ValueError):
        return None


def _message_fields(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    raise TypeError


def _wait_s(answer: Answer) -> float:
    """How long a server that is too busy asks us to wait before the next attempt; what the package waits otherwise."""
    for header, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(answer.headers[header]) * unit_s
        except (KeyError, ValueError):
            continue
        if 0 <= seconds <= LONGEST_WAIT_S:
            return seconds
    return USUAL_WAIT_S


def _read_completion(answer: Answer) -> ChatCompletion:
    try:
        completion = ChatCompletion.model_validate_json(answer.body)
    except ValidationError:
        try:
            completion = ChatCompletion.construct(**json.loads(answer.body))
        except (ValueError, TypeError) as error:
            raise openai.APIConnectionError(
                message=f"the endpoint answered with HTTP {answer.status} and something that is no chat completion:"
                f" {answer.body[:200].decode(errors='replace')!r}",
                request=httpx.Request("POST", "chat/completions"),
            ) from error
    completion._request_id = answer.headers.get("x-request-id")
    return completion
