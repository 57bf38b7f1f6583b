"""The HTTP surface: vLLM's addresses, the API key, and errors in OpenAI's form everywhere.

Knows addresses and what stands behind each; how a request is answered is `completions`' and `control`'s.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from art_engine_kit.event_stream import has_key

from .api_bodies import json_response
from .api_errors import ApiError
from .completions import CompletionHandlers
from .control import ControlHandlers
from .engine import EngineStopped, InferenceEngineThread
from .prompts import Prompts
from .vocabulary import Vocabulary

logger = logging.getLogger(__name__)
Handler = Callable[[Request], Awaitable[Response]]


class InferenceApp:
    """One served model. `vocabulary` gives the tokenizer once it is loaded; `api_key` None lets everyone in.

    `prompts` starts and ends with the application.
    """

    def __init__(
        self,
        engine: InferenceEngineThread,
        vocabulary: Callable[[], Vocabulary],
        prompts: Prompts,
        *,
        served_name: str,
        api_key: str | None,
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._served_name = served_name
        self._api_key = api_key
        answers = CompletionHandlers(engine, vocabulary, prompts, served_name=served_name)
        control = ControlHandlers(engine)
        guarded = self._guarded
        self.asgi = Starlette(
            routes=[
                Route("/health", self._health, methods=["GET"]),
                Route("/v1/models", guarded(self._models), methods=["GET"]),
                Route("/v1/chat/completions", guarded(answers.chat), methods=["POST"]),
                Route("/v1/completions", guarded(answers.complete), methods=["POST"]),
                Route("/v1/load_lora_adapter", guarded(control.load), methods=["POST"]),
                Route("/v1/unload_lora_adapter", guarded(control.unload), methods=["POST"]),
                Route("/pause", guarded(control.pause), methods=["POST"]),
                Route("/resume", guarded(control.resume), methods=["POST"]),
                Route("/is_paused", guarded(control.is_paused), methods=["GET"]),
                Route("/sleep", guarded(control.sleep), methods=["POST"]),
                Route("/wake_up", guarded(control.wake), methods=["POST"]),
                Route("/stats", guarded(self._stats), methods=["GET"]),
            ],
            exception_handlers={404: _no_such_address, 405: _no_such_address},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with self._prompts:
            yield

    @property
    def _ready(self) -> bool:
        return self._engine.ready and self._prompts.ready

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                if not self._ready:
                    raise ApiError(503, "The server is not ready: the model is loading, or the engine has ended.")
                return await handler(request)
            except ApiError as error:
                return json_response(error.body(), error.status)
            except EngineStopped as error:
                return json_response(ApiError(503, str(error)).body(), 503)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                logger.exception("%s %s failed.", request.method, request.url.path)
                return json_response(ApiError(500, f"{type(error).__name__}: {error}").body(), 500)

        return guarded

    def _check_key(self, request: Request) -> None:
        if self._api_key is not None and not has_key(request.scope, self._api_key):
            raise ApiError(
                401, "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.", code="invalid_api_key"
            )

    async def _health(self, _: Request) -> Response:
        return Response(status_code=200 if self._ready else 503)

    async def _models(self, _: Request) -> Response:
        max_len = self._engine.scheduler.limits.max_len
        common = {"object": "model", "created": 0, "owned_by": "art-engine-torch"}
        base = {"id": self._served_name, **common, "root": self._served_name, "parent": None, "max_model_len": max_len}
        adapters = [
            {"id": name, **common, "root": self._engine.adapter(name).path, "parent": self._served_name}
            for name in self._engine.adapter_names()
        ]
        return json_response({"object": "list", "data": [base, *adapters]})

    async def _stats(self, _: Request) -> Response:
        return json_response(self._engine.statistics())


async def _no_such_address(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    message = f"There is no {request.method} {request.url.path} on this server."
    return json_response(ApiError(status, message).body(), status)
