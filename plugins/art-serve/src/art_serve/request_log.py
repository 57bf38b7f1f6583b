"""A line of JSON for each request and each event of the server, all with the request's id; and figures for Prometheus.

Nothing of a body, a key or a query is written down.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = "X-Request-Id"
_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_ACCEPTED = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
_log = logging.getLogger("art_serve.requests")


class JsonLines(logging.Formatter):
    """One object a line: time, level, logger, message, the request's id, and whatever was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := _request_id.get()) is not None:
            line["request_id"] = request_id
        line |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Figures:
    """What Prometheus reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ["method", "address", "status"]
        self.requests = Counter("art_serve_requests", "Requests answered.", labels, registry=self.registry)
        self.seconds = Histogram(
            "art_serve_request_seconds",
            "Time until a request was answered whole, its body included.",
            ["method", "address"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.under_way = Gauge("art_serve_requests_under_way", "Requests being answered.", registry=self.registry)
        self.jobs = Gauge("art_serve_jobs", "Jobs in each state.", ["state"], registry=self.registry)
        self.models = Gauge("art_serve_models", "Models that aren't deleted.", registry=self.registry)


class RequestLog:
    """Gives each request an id, or keeps the client's, and notes how it was answered."""

    def __init__(self, app: ASGIApp, *, figures: Figures) -> None:
        self._app = app
        self._figures = figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass it on and note it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given.decode() if _ACCEPTED.fullmatch(given) else uuid.uuid4().hex
        token, start = _request_id.set(request_id), time.perf_counter()
        status = 499

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        self._figures.under_way.inc()
        try:
            await self._app(scope, receive, sending)
        finally:
            self._figures.under_way.dec()
            self._note(scope, status, time.perf_counter() - start)
            _request_id.reset(token)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        # The address with its parameters' names: values would make a series of their own each.
        address = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE") else "other"
        self._figures.requests.labels(method, address, str(status)).inc()
        self._figures.seconds.labels(method, address).observe(seconds)
        level = logging.INFO if status < 500 else logging.ERROR
        extra = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
            "entity": scope.get("state", {}).get("entity"),
        }
        _log.log(level, "answered" if status != 499 else "the client went away", extra=extra)
