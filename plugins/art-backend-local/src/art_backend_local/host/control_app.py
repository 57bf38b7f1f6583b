"""The control API of a host: HTTP addresses under `/_art/` for its clients and for `art ps`, behind a token of their
own.

Turns requests into calls and nothing more; what they do is the state's, the training step's and the models'.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from uuid import uuid4

import orjson
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from art_core import ArtError, ModelKey
from art_engine_kit.event_stream import has_key

from ..adapters.copies import fork_checkpoint
from ..wire.errors import error_to_json
from ..wire.messages import (
    PREFIX,
    BeginRequest,
    ForkRequest,
    LeaseEnd,
    LeaseRequest,
    OfModel,
    PublishRequest,
    PutAsideRequest,
    RegisterRequest,
    ReleaseRequest,
    StepsRequest,
    TrainRequest,
)
from ..wire.told_work import Emit, told
from .host import Host
from .sessions import Session
from .status import host_status
from .training_step import begin_step, publish_step, put_step_aside, release_step, train_step

JSON = dict[str, Any]
RequestT = TypeVar("RequestT", bound=BaseModel)
_log = logging.getLogger(__name__)


class ControlApp:
    """The ASGI application. `port` is where the gateway listens, `api_key` what it takes, `shut_down` ends the host."""

    def __init__(self, host: Host, *, token: str, api_key: str, port: int, shut_down: Callable[[], None]) -> None:
        self._host = host
        self._api_key = api_key
        self._port = port
        self._shut_down = shut_down
        answers: dict[str, Callable[[Request], Awaitable[Any]]] = {
            "unregister": self._unregister, "steps": self._steps, "delete": self._delete, "fork": self._fork,
            "begin": self._begin, "put_aside": self._put_aside, "release": self._release, "lease": self._lease,
            "end_lease": self._end_lease, "shutdown": self._stop,
        }  # fmt: skip
        routes = [
            Route(f"{PREFIX}/status", self._answered(self._status)),
            Route(f"{PREFIX}/session", self._session, methods=["POST"]),
            Route(f"{PREFIX}/register", self._register, methods=["POST"]),
            Route(f"{PREFIX}/train", self._train, methods=["POST"]),
            Route(f"{PREFIX}/publish", self._publish, methods=["POST"]),
            *(Route(f"{PREFIX}/{name}", self._answered(work), methods=["POST"]) for name, work in answers.items()),
        ]
        self.app: ASGIApp = _RequireToken(Starlette(routes=routes, exception_handlers={ValueError: _misread}), token)

    def _answered(self, work: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                return _json(200, await work(request))
            except (ArtError, OSError, ValueError, TypeError) as error:
                return _json(409, {"error": error_to_json(error)})

        return answer

    async def _status(self, _: Request) -> JSON:
        return await asyncio.to_thread(host_status, self._host)

    async def _session(self, _: Request) -> ASGIApp:
        async def work(emit: Emit) -> None:
            session = self._host.sessions.begin()
            try:
                emit({"event": "session", "id": session.id})
                while True:
                    emit({"event": "warning", "message": await session.events.get()})
            finally:
                self._host.sessions.end(session)

        return told(work)

    async def _register(self, request: Request) -> ASGIApp:
        given = await _read(request, RegisterRequest)

        async def work(emit: Emit) -> JSON:
            self._session_of(given)
            model = await self._host.register(given, emit)
            return {
                "inference_base_url": f"http://127.0.0.1:{self._port}/{given.project}/v1",
                "inference_api_key": self._api_key,
                "step": model.steps.routed,
                "pending": await model.pending(),
            }

        return told(work)

    async def _unregister(self, request: Request) -> JSON:
        given = await _read(request, OfModel)
        await self._host.unregister(given.key)
        return {}

    async def _train(self, request: Request) -> ASGIApp:
        given = await _read(request, TrainRequest)

        async def work(emit: Emit) -> JSON:
            self._session_of(given)
            return await train_step(self._host, given, emit)

        return told(work)

    async def _publish(self, request: Request) -> ASGIApp:
        given = await _read(request, PublishRequest)

        async def work(_: Emit) -> JSON:
            self._session_of(given)
            return await publish_step(self._host.model(given.key), given)

        return told(work)

    async def _begin(self, request: Request) -> JSON:
        given = await _read(request, BeginRequest)
        return await begin_step(self._host.model(given.key), self._session_of(given), given)

    async def _put_aside(self, request: Request) -> JSON:
        given = await _read(request, PutAsideRequest)
        self._session_of(given)
        return await put_step_aside(self._host.model(given.key), given)

    async def _release(self, request: Request) -> JSON:
        given = await _read(request, ReleaseRequest)
        return await release_step(self._host.model(given.key), given, self._session_of(given))

    async def _steps(self, request: Request) -> JSON:
        given = await _read(request, OfModel)
        model = self._host.model(given.key)
        return {
            "routed": model.steps.routed,
            "steps": list(await model.on_disk()),
            "loaded": sorted(model.steps.loaded),
        }

    async def _delete(self, request: Request) -> JSON:
        given = await _read(request, StepsRequest)
        return {"deleted": await self._host.model(given.key).delete(given.steps)}

    async def _fork(self, request: Request) -> JSON:
        given = await _read(request, ForkRequest)
        source = ModelKey(given.from_project or given.project, given.from_model)
        step = await asyncio.to_thread(
            fork_checkpoint, self._host.path, source, given.key, not_after_step=given.not_after_step
        )
        return {"step": step}

    async def _lease(self, request: Request) -> JSON:
        given = await _read(request, LeaseRequest)
        session, model = self._session_of(given), self._host.model(given.key)
        while True:
            step = model.steps.routed if given.step is None else given.step
            assert step is not None, "a registered model has a routed step"
            await model.ensure_loaded(step)
            if step in model.steps.loaded:
                break
        model.steps.lease(step)
        leased = step

        def let_go() -> None:
            model.steps.end_lease(leased)
            model.ended.set()

        lease = uuid4().hex
        session.hold(lease, let_go)
        return {"lease": lease, "step": step}

    async def _end_lease(self, request: Request) -> JSON:
        given = await _read(request, LeaseEnd)
        self._host.sessions.get(given.session).let_go(given.lease)
        return {}

    async def _stop(self, _: Request) -> JSON:
        self._shut_down()
        return {}

    def _session_of(self, request: OfModel) -> Session:
        return self._host.sessions.get(request.session)


class _RequireToken:
    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if has_key(scope, self._token):
            await self._app(scope, receive, send)
        else:
            await _json(401, {"error": {"type": "BackendUnreachable", "message": "the control token is wrong"}})(
                scope, receive, send
            )


async def _read(request: Request, kind: type[RequestT]) -> RequestT:
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise ValueError(f"the host does not understand the client: {error}. Are their versions the same?") from error


async def _misread(_: Request, error: Exception) -> Response:
    return _json(409, {"error": error_to_json(error)})


def _json(status: int, value: Any) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")
