"""The application: the wire, inference, health and the OpenAPI page under one roof, and every error in the wire's form.

Knows the routers and nothing of what they do.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.responses import Response
from starlette.routing import Match, Route, compile_path
from starlette.types import ASGIApp, Scope

from art_backend_serverless import wire
from art_core import BackendCapability
from art_gateway.errors import ApiError

from .access import Access, RequireKey
from .answers import DISK_FULL, ERRORS
from .catalogue import Catalogue
from .health import figures_router, health_router
from .inference import ArtifactRoutes, Inference, not_served
from .inference_page import inference_paths, links_to_inference
from .job_payload import own_train_options
from .request_log import Figures, RequestLog
from .request_rate import RequestRate
from .service import Service
from .wire_files import files_router
from .wire_jobs import jobs_router
from .wire_models import models_router

BASE = "/v1"
_log = logging.getLogger("art_serve.app")


@asynccontextmanager
async def serving_app(service: Service) -> AsyncIterator[ASGIApp]:
    """The application; leaving it closes its connections to the backend."""
    inference = Inference(ArtifactRoutes(service.backend, service.catalogue, service.transactions), service.catalogue)
    try:
        yield make_app(service, inference)
    finally:
        await inference.close()


def make_app(service: Service, inference: Inference) -> ASGIApp:
    """Put together what answers."""
    bearer = HTTPBearer(auto_error=False, description="A key made by: art serve keys create ENTITY")
    app = _Application(
        title="art serve",
        version=version("art-serve"),
        description="Trains and serves models for clients elsewhere: the wire of art-backend-serverless, and OpenAI's"
        " addresses of chat and completions for each model, under its artifact name.",
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    figures = Figures()
    protected = [Security(bearer)]
    app.include_router(health_router(service))
    app.include_router(figures_router(service, figures), dependencies=protected)
    app.include_router(_capabilities(service), prefix=BASE, dependencies=protected, tags=["capabilities"])
    app.include_router(models_router(service), prefix=BASE, dependencies=protected, tags=["models"])
    app.include_router(jobs_router(service), prefix=BASE, dependencies=protected, tags=["training jobs"])
    app.include_router(files_router(service), prefix=BASE, dependencies=protected, tags=["checkpoint files"])
    app.include_router(
        _model_cards(inference, service.catalogue), prefix=BASE, dependencies=protected, tags=["inference"]
    )
    app.router.routes += [
        _NamedRoute(f"{BASE}/chat/completions", inference.chat, methods=["POST"]),
        _NamedRoute(f"{BASE}/completions", inference.text, methods=["POST"]),
    ]
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _HttpError(app))
    failures = {DBAPIError: _database_error, OSError: _disk_error}
    for error, handler in failures.items():
        app.add_exception_handler(error, handler)
    app.add_exception_handler(Exception, _own_error)
    rate = RequestRate(per_s=service.limits.requests_per_s, burst=service.limits.requests_at_once)
    guarded = RequireKey(app, access=Access(service.transactions), rate=rate)
    # Who asks is looked up before the application is reached, in the same database and with the same ways to fail.
    answering = ExceptionMiddleware(guarded, handlers=failures)
    return RequestLog(answering, figures=figures)


class _Application(FastAPI):
    """With the addresses of inference on its page, which FastAPI doesn't see: they read and answer by themselves."""

    def openapi(self) -> dict[str, Any]:
        """The page."""
        if self.openapi_schema is None:
            page = super().openapi()
            page["paths"] |= {BASE + address: item for address, item in inference_paths().items()}
        return self.openapi_schema or {}


class _NamedRoute(Route):
    """Leaves itself in the scope, as FastAPI's routes do: the figures are kept by the address that it names."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """As any route, with itself."""
        match, found = super().matches(scope)
        return match, {**found, "route": self} if match is not Match.NONE else found


def _capabilities(service: Service) -> APIRouter:
    router = APIRouter(responses=ERRORS)

    @router.get(wire.CAPABILITIES)
    async def capabilities(request: Request) -> wire.Capabilities:
        """What this server does beyond the published wire, and whose key this is."""
        declared = service.backend.capabilities
        return wire.Capabilities(
            entity=request.state.entity,
            fork=BackendCapability.FORK in declared,
            pull=BackendCapability.PULL in declared,
            uploads=BackendCapability.SFT in declared,
            content_encodings=["gzip"],
            train_options=own_train_options(service.backend.backend),
        )

    return router


def _model_cards(inference: Inference, catalogue: Catalogue) -> APIRouter:
    router = APIRouter(responses=ERRORS)

    @router.get("/models", responses={200: {"links": links_to_inference("{$response.body#/data/0/id}")}})
    async def list_models(request: Request) -> dict[str, object]:
        """The models that the key's entity can ask, in OpenAI's form."""
        return {"object": "list", "data": inference.cards(request.state.entity)}

    @router.get("/models/{model:path}")
    async def one_model(request: Request, model: str) -> dict[str, object]:
        """One of them, by its artifact name."""
        for card in inference.cards(request.state.entity):
            if model in (card["id"], card["root"]):
                return card
        raise not_served(model, catalogue, request.state.entity)

    return router


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return JSONResponse(error.body, error.status, headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = "; ".join(f"{'.'.join(map(str, p['loc'][1:]))}: {p['msg']}" for p in error.errors()[:5])
    param = ".".join(map(str, error.errors()[0]["loc"][1:])) if error.errors() else None
    return await _api_error(request, ApiError(422, problems, code="invalid_request", param=param))


class _HttpError:
    """What is at no address, and what an address doesn't take, with the methods that it does take."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._addresses: list[tuple[re.Pattern[str], frozenset[str]]] = []

    async def __call__(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        base = (
            "" if path.startswith(BASE + "/") else f" A client's base_url ends in {BASE}: {request.base_url}{BASE[1:]}"
        )
        words = {404: f"There is nothing at {path[:300]!r}.{base}", 405: f"It doesn't take {request.method}."}
        message = words.get(error.status_code, error.detail)
        answer = await _api_error(request, ApiError(error.status_code, message, code="http_error"))
        answer.headers.update(error.headers or {})
        if error.status_code == 405:
            answer.headers["Allow"] = ", ".join(sorted(self._methods(path)))
        return answer

    def _methods(self, path: str) -> set[str]:
        # Each route knows its own method only, and the first of a path answers for all of them.
        if not self._addresses:
            for address, operations in self._app.openapi()["paths"].items():
                methods = frozenset(operation.upper() for operation in operations)
                self._addresses.append((compile_path(address)[0], methods))
        return {method for pattern, methods in self._addresses if pattern.match(path) for method in methods}


async def _database_error(request: Request, error: Exception) -> Response:
    _log.error("the database failed: %s", error)
    message = "The server's database doesn't answer now; nothing of this request was kept. Ask again."
    return await _api_error(
        request, ApiError(503, message, code="database_unavailable", type="server_error", retry_after_s=5)
    )


async def _disk_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    _log.error("a file could not be written: %s", error)
    if error.errno not in DISK_FULL:
        return await _own_error(request, error)
    message = "The server's disk is full; nothing of this request was kept. Tell whoever runs it, and ask again."
    full = ApiError(503, message, code="disk_full", type="server_error", retry_after_s=30)
    return await _api_error(request, full)


async def _own_error(request: Request, error: Exception) -> Response:
    message = f"The server failed on this request ({type(error).__name__}); its log says where."
    return await _api_error(request, ApiError(500, message, code="server_error", type="server_error"))
