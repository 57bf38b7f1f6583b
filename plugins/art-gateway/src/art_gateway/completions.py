"""The way of one request: read, routed, sent to the engine, answered in the one form, released.

Knows HTTP and the `Routes` it was given; what an engine's requests and answers look like is the engine's dialect. The
route is held until the last byte has gone out or the client is gone, and released exactly once.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from typing import Any

import aiohttp
import orjson
from aiohttp.payload import BytesIOPayload, BytesPayload
from starlette.types import Message, Receive, Scope, Send

from art_core import ArtError
from art_core.engines import Endpoint
from art_core.errors import CheckpointNotFound, InvalidName, InvalidRequest
from art_core.names import parse_inference_name

from .altered_sampling import altered_by
from .answers import StreamNormaliser, died, normalise_answer
from .catalogue import not_served, several_projects
from .errors import ApiError, engine_error, send_bytes
from .limits import GatewayLimits
from .open_files import requests_at_once
from .routes import Route, Routes, RouteUnavailable

# Below every server's own limit for idle connections (uvicorn's is 5 s), so that none is used while it is being closed.
_IDLE_CONNECTION_S = 2.0
_ONE_PIECE = 2**20
JSON = dict[str, Any]
_STREAM = b"text/event-stream; charset=utf-8"


class ClientGone(Exception):
    """The client hung up, or has stopped reading: nobody is there to be answered."""


class EngineLost(Exception):
    """The server behind a route is gone, and the client has not got a byte yet. `error` is what to tell it."""

    def __init__(self, error: ApiError, *, took_nothing: bool) -> None:
        self.error, self.took_nothing = error, took_nothing
        super().__init__(str(error))


class Upstream:
    """The connections to the engines: as many as there are requests and files allow, kept for the next ones."""

    def __init__(self, limits: GatewayLimits) -> None:
        self._limits = limits
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """The open session, made at the first request."""
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=requests_at_once(), keepalive_timeout=_IDLE_CONNECTION_S),
                timeout=aiohttp.ClientTimeout(total=self._limits.answer_s, sock_connect=self._limits.connect_s),
                headers={"Accept-Encoding": "identity", "Content-Type": "application/json"},
                cookie_jar=aiohttp.DummyCookieJar(),
                raise_for_status=False,
                read_bufsize=2**20,
            )
        return self._session

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()


class Completions:
    """The ASGI endpoint behind `chat/completions` or `completions`."""

    def __init__(self, endpoint: Endpoint, routes: Routes, upstream: Upstream, limits: GatewayLimits) -> None:
        self._endpoint: Endpoint = endpoint
        self._routes = routes
        self._upstream = upstream
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or stop when the client is gone."""
        try:
            content = await self._read(scope, receive)
        except ClientGone:
            return
        except ApiError as error:
            await error.send(send)
            return
        answer = asyncio.create_task(self._answer(scope["path_params"].get("project"), content, send))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            answer.cancel()
            # Waits for the release of the route; what the answer raised is raised below.
            await asyncio.gather(answer, gone, return_exceptions=True)
        if not answer.cancelled() and not isinstance(answer.exception(), ClientGone):
            answer.result()

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._limits.request_bytes
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if announced.isdigit() and int(announced) > limit:
            raise _too_large(limit)
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.request_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    piece = message.get("body", b"")
                    size += len(piece)
                    if size > limit:
                        raise _too_large(limit)
                    pieces.append(piece)
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            raise ApiError(
                408, f"The request's body did not arrive within {self._limits.request_s:g} s.", code="request_timeout"
            ) from None

    async def _answer(self, project: str | None, content: bytes, send: Send) -> None:
        try:
            request = _parse(content)
            route = await self._acquire(project, request["model"])
        except ApiError as error:
            await error.send(send)
            return
        try:
            # The engine's side has limits of its own; this one is for a client that doesn't read its answer.
            async with asyncio.timeout(self._limits.answer_s + self._limits.reader_s):
                await self._ask_until_answered(project, route, request, send)
        except ApiError as error:
            await error.send(send)
        except TimeoutError:
            raise ClientGone(f"the client of {route.name} didn't read its answer") from None

    async def _ask_until_answered(self, project: str | None, route: Route, request: JSON, send: Send) -> None:
        """Forward, and ask the same step again when the server is lost before the client got a byte.

        A server that took no connection has done nothing, so it is asked until `refusals` are used up; one that broke
        an answer off is asked once more only, since the request itself may be what ends it.
        """
        refusals, breaks = list(self._limits.refused_again_s), 1
        while True:
            try:
                await self._forward(route, request, send)
                return
            except EngineLost as lost:
                route.unreachable()
                if lost.took_nothing and refusals:
                    await asyncio.sleep(refusals.pop(0))
                elif not lost.took_nothing and breaks:
                    breaks -= 1
                    await asyncio.sleep(self._limits.broken_again_s)
                else:
                    raise lost.error from lost.__cause__
                # The new hold comes before the old one ends, so that the step can't be unloaded in between.
                again = await self._acquire(project, route.name)
            finally:
                route.release()
            route = again

    async def _acquire(self, project: str | None, requested: str) -> Route:
        try:
            name, _ = parse_inference_name(requested)
            if project is None:
                projects = self._routes.projects_of(name)
                if len(projects) > 1:
                    raise several_projects(requested, projects)
                if not projects:
                    raise not_served(self._routes, None, requested)
                (project,) = projects
            async with asyncio.timeout(self._limits.route_s):
                return await self._routes.acquire(project, requested)
        except InvalidName as error:
            raise ApiError(400, str(error), code="invalid_model_name", param="model") from error
        except CheckpointNotFound:
            raise not_served(self._routes, project, requested) from None
        except RouteUnavailable as error:
            raise engine_error(503, str(error), code="engine_unavailable", retry_after_s=error.retry_after_s) from error
        except TimeoutError:
            message = f"{requested!r} could not be asked within {self._limits.route_s:g} s: its engine is not back yet."
            raise engine_error(503, message, code="engine_unavailable", retry_after_s=10) from None

    async def _forward(self, route: Route, request: dict[str, Any], send: Send) -> None:
        headers = {"Authorization": f"Bearer {route.upstream_key}"} if route.upstream_key else {}
        try:
            asked = _with_template_arguments(request, route) if self._endpoint == "chat/completions" else request
            payload = orjson.dumps(route.engine.prepare_request(self._endpoint, asked, route.adapter))
        except InvalidRequest as error:
            raise ApiError(400, str(error), code="invalid_request", param=error.param) from error
        except ArtError as error:
            raise ApiError(400, str(error), code="engine_cannot") from error
        except orjson.JSONEncodeError as error:  # it reads deeper than it writes
            raise ApiError(400, f"The request cannot be passed on: {error}.", code="invalid_json") from error
        # A large body goes out in pieces, with other requests in between.
        data = BytesIOPayload(io.BytesIO(payload)) if len(payload) > _ONE_PIECE else BytesPayload(payload)
        url = f"{route.upstream_url}/v1/{self._endpoint}"
        step, altered = (b"x-art-step", b"%d" % route.step), altered_by(request)
        try:
            async with self._upstream.session.post(url, data=data, headers=headers, allow_redirects=False) as answer:
                content_type = answer.headers.get("Content-Type", "application/json")
                if answer.status == 200 and content_type.startswith("text/event-stream"):
                    await self._relay(answer, route, step, altered, send)
                    return
                body = await answer.read()
                status, retry_after = answer.status, answer.headers.get("Retry-After")
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            message = f"The engine behind {route.name} takes no connections ({error}); it has died or is restarting."
            unavailable = engine_error(503, message, code="engine_unavailable", retry_after_s=2)
            raise EngineLost(unavailable, took_nothing=True) from error
        except TimeoutError as error:
            message = f"The engine behind {route.name} gave no whole answer within {self._limits.answer_s:g} s."
            raise engine_error(504, message, code="engine_timeout") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineLost(died(route, error), took_nothing=False) from error
        if status in (401, 403):
            # The user's key never reaches the engine; passed on, this would blame it.
            raise engine_error(
                502, f"The engine behind {route.name} refused the gateway's own key.", code="engine_refused_gateway"
            )
        headers_out = (step,) if retry_after is None else (step, (b"retry-after", retry_after.encode()))
        if status != 200:
            await send_bytes(send, status, body, content_type=content_type.encode(), headers=headers_out)
            return
        await send_bytes(send, 200, normalise_answer(route, self._endpoint, body, altered), headers=headers_out)

    async def _relay(
        self,
        answer: aiohttp.ClientResponse,
        route: Route,
        step: tuple[bytes, bytes],
        altered: Sequence[str],
        send: Send,
    ) -> None:
        """Pass a stream on event by event. Whatever ends it early becomes an error event, so that a cut answer never
        looks whole.
        """
        headers = [(b"content-type", _STREAM), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"), step]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        stream = StreamNormaliser(route, self._endpoint, altered)
        out = bytearray()
        failure: ApiError | None = None
        try:
            async for piece in answer.content.iter_any():
                for event in stream.feed(piece):
                    out += event
                if out:
                    await send({"type": "http.response.body", "body": bytes(out), "more_body": True})
                    out.clear()
            if not stream.ended:
                failure = died(route, "its stream ended without [DONE]")
        except ApiError as error:
            failure = error
        except TimeoutError:
            message = f"The engine behind {route.name} did not end its stream within {self._limits.answer_s:g} s."
            failure = engine_error(504, message, code="engine_timeout")
        except (aiohttp.ClientError, OSError) as error:
            failure = died(route, error)
        if failure is not None:
            out += b"data: " + orjson.dumps(failure.body) + b"\n\n"
        await send({"type": "http.response.body", "body": bytes(out)})


def _with_template_arguments(request: JSON, route: Route) -> JSON:
    """With the model's own arguments for its chat template, where the request doesn't bring others."""
    own = request.get("chat_template_kwargs")
    if own is not None and not isinstance(own, dict):
        raise InvalidRequest("chat_template_kwargs: must be an object.", param="chat_template_kwargs")
    if not route.template_arguments:
        return request
    return {**request, "chat_template_kwargs": {**route.template_arguments, **(own or {})}}


def _parse(content: bytes) -> dict[str, Any]:
    try:
        request = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The request's body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(request, dict):
        raise ApiError(400, "The request's body must be a JSON object.", code="invalid_json")
    model = request.get("model")
    if not isinstance(model, str) or not model:
        raise ApiError(
            400,
            "The request names no model: give 'model', such as 'my-agent' for its latest step or 'my-agent@3'.",
            code="model_missing",
            param="model",
        )
    return request


async def _until_gone(receive: Receive) -> None:
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request is larger than {limit // 2**20} MiB.", code="request_too_large")
