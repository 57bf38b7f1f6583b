"""The application: addresses, the API key, the list of models, and errors in OpenAI's form everywhere.

Knows nothing of how a request is answered (`completions`) nor of what is served (`Routes`).
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as Address
from starlette.types import ASGIApp, Receive, Scope, Send

from .catalogue import model_cards, not_served
from .completions import Completions, Upstream
from .errors import ApiError
from .limits import GatewayLimits
from .routes import Routes


class Gateway:
    """The gateway as a part of a host's own application: `app` is mounted at its root.

    An asynchronous context manager; leaving it closes the connections to the engines. `api_key` is what users send as
    their bearer token; it may not be empty.
    """

    def __init__(self, routes: Routes, *, api_key: str, limits: GatewayLimits | None = None) -> None:
        if not api_key:
            raise ValueError("the gateway needs an API key: without one any program on this machine could ask")
        limits = limits or GatewayLimits()
        self._routes = routes
        self._upstream = Upstream(limits)
        chat = Completions("chat/completions", routes, self._upstream, limits)
        text = Completions("completions", routes, self._upstream, limits)
        addresses = [Address("/health", _health, methods=["GET"])]
        for prefix in ("/{project}/v1", "/v1"):
            addresses += [
                Address(f"{prefix}/chat/completions", chat, methods=["POST"]),
                Address(f"{prefix}/completions", text, methods=["POST"]),
                Address(f"{prefix}/models", self._list_models, methods=["GET"]),
                Address(f"{prefix}/models/{{model:path}}", self._one_model, methods=["GET"]),
            ]
        self.app: Starlette = Starlette(
            routes=addresses,
            middleware=[Middleware(_RequireKey, api_key=api_key)],
            exception_handlers={HTTPException: _http_error, ApiError: _api_error, Exception: _own_error},
            lifespan=self._lifespan,
        )
        # A slash too many is a wrong address, not a redirect that would lose the body.
        self.app.router.redirect_slashes = False

    async def close(self) -> None:
        """Close the connections to the engines. A second call does nothing."""
        await self._upstream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self.close()

    async def _list_models(self, request: Request) -> Response:
        cards = model_cards(self._routes, request.path_params.get("project"))
        return _json(200, {"object": "list", "data": cards})

    async def _one_model(self, request: Request) -> Response:
        project, name = request.path_params.get("project"), request.path_params["model"]
        for card in model_cards(self._routes, project):
            if card["id"] == name:
                return _json(200, card)
        raise not_served(self._routes, project, name)


def create_app(routes: Routes, *, api_key: str, limits: GatewayLimits | None = None) -> Starlette:
    """The gateway as an application of its own, for a server to run with `SERVER_OPTIONS`."""
    return Gateway(routes, api_key=api_key, limits=limits).app


class _RequireKey:
    """Lets nothing but `/health` pass without the key."""

    def __init__(self, app: ASGIApp, *, api_key: str) -> None:
        self._app = app
        self._expected = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health" or self._is_right(scope):
            await self._app(scope, receive, send)
            return
        await ApiError(
            401,
            "The API key is missing or wrong. Send 'Authorization: Bearer KEY', with the key that the model got when it"
            " was registered (model.inference_api_key).",
            code="invalid_api_key",
            headers=((b"www-authenticate", b"Bearer"),),
        ).send(send)

    def _is_right(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(key.strip(), self._expected)


async def _health(_: Request) -> Response:
    return _json(200, {"status": "ok"})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = (
            f"There is nothing at {request.method} {request.url.path}. The gateway answers"
            " /PROJECT/v1/chat/completions, /PROJECT/v1/completions and /PROJECT/v1/models, also without /PROJECT."
        )
        return _error(ApiError(404, message, code="unknown_url"))
    if error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}."
        return _error(ApiError(405, message, code="method_not_allowed"), dict(error.headers or {}))
    return _error(ApiError(error.status_code, error.detail, code="http_error"))


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error)


async def _own_error(_: Request, error: Exception) -> Response:
    message = f"The gateway failed on this request ({type(error).__name__}); its log says where."
    return _error(ApiError(500, message, code="gateway_error", type="server_error"))


def _error(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    extra = {name.decode(): value.decode() for name, value in error.headers}
    return _json(error.status, error.body, {**extra, **(headers or {})})


def _json(status: int, value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, media_type="application/json")
