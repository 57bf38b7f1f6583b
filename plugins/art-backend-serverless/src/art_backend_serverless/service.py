"""Requests to the training service: each with its limit, repeated where that is safe, and read or refused in words.

Knows HTTP, keys and the wire's messages; knows neither jobs nor models. Connections live as long as a block of
`connected`, so that a service may be used on any event loop.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, overload
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
from pydantic import BaseModel, ValidationError
from tenacity import AsyncRetrying, RetryCallState

from . import wire
from .address import ApiKey, is_loopback
from .bodies import Spooled
from .errors import OutcomeUnknown, ServiceRefused, ServiceUnreachable, refusal, without_key

MessageT = TypeVar("MessageT", bound=BaseModel)
_TIMEOUT = httpx.Timeout(connect=10.0, read=90.0, write=60.0, pool=None)
# A service looks through what it was sent before it answers.
_UPLOAD = httpx.Timeout(connect=10.0, read=600.0, write=60.0, pool=None)
NOT_TAKEN = frozenset({408, 429, 503})
_GATEWAYS = frozenset({502, 504, 520, 521, 522, 523, 524})
_MOST_500S = 4
_LONGEST_RETRY_AFTER_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a client tries and waits, in seconds.

    `request_s`: a request is repeated for so long while the service can't be reached or is too busy, `first_s` while it
    has never been reached. `pause_s` is the first pause between two attempts, and between two looks at a job; pauses
    double up to `longest_pause_s` and, of looks, up to `poll_s`. `job_silence_s`: a job of which nothing is heard for
    so long is given up.
    """

    request_s: float = 180.0
    first_s: float = 20.0
    pause_s: float = 0.25
    longest_pause_s: float = 5.0
    poll_s: float = 2.0
    job_silence_s: float = 3600.0

    def pause(self, attempt: int) -> float:
        """The pause after an attempt, counted from 1, never the same for all clients."""
        return self._jittered(attempt, self.longest_pause_s)

    def poll_pause(self, look: int) -> float:
        """The pause after a look at a job, counted from 1."""
        return self._jittered(look, self.poll_s)

    def _jittered(self, number: int, longest_s: float) -> float:
        return min(longest_s, self.pause_s * 2.0 ** min(number - 1, 30)) * random.uniform(0.5, 1.0)


class _Failed(Exception):
    """An attempt that may be made again; `error` is what is raised when it isn't."""

    def __init__(self, error: Exception, *, after_s: float | None = None, most: int | None = None) -> None:
        self.error, self.after_s, self.most = error, after_s, most


class Service:
    """A training service. `say` is told in words what is waited for; it may change with each use."""

    def __init__(self, base_url: str, key: ApiKey, patience: Patience) -> None:
        self.base_url = base_url
        self.patience = patience
        self._key = key
        self._reached = False
        self._tls: ssl.SSLContext | None = None
        self._capabilities: wire.Capabilities | None = None
        self._asked = False

    @property
    def api_key(self) -> str:
        """The key. Raises KeyMissing."""
        return self._key.value()

    @property
    def reached(self) -> bool:
        """True once it has answered anything."""
        return self._reached

    @asynccontextmanager
    async def connected(self, say: Callable[[str], None] = lambda _: None) -> AsyncIterator[Connection]:
        """A connection for some requests, closed with the block. Raises KeyMissing."""
        key = self.api_key
        parts = urlsplit(self.base_url)
        if self._tls is None:
            # Loading certificates takes a tenth of a second, for which a plain address has no use.
            tls = parts.scheme == "https"
            self._tls = (
                await asyncio.to_thread(httpx.create_ssl_context) if tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            )
        async with httpx.AsyncClient(
            verify=self._tls,
            timeout=_TIMEOUT,
            headers={"Authorization": f"Bearer {key}", "Accept": "application/json"},
            trust_env=not is_loopback(parts.hostname or ""),
        ) as http:
            yield Connection(self, http, key, say)

    async def capabilities(self, connection: Connection) -> wire.Capabilities | None:
        """What it can do beyond the published calls, None when it doesn't know the question; asked once."""
        if not self._asked:
            self._capabilities = await connection.capabilities()
            self._asked = True
        return self._capabilities

    def answered(self) -> None:
        """It is there."""
        self._reached = True


class Connection:
    """Open connections to a service."""

    def __init__(self, service: Service, http: httpx.AsyncClient, key: str, say: Callable[[str], None]) -> None:
        self._service = service
        self._http = http
        self._key = key
        self._say = say

    async def get(self, path: str, answer: type[MessageT], *, doing: str, query: BaseModel | None = None) -> MessageT:
        """GET, repeated on any failure that may pass."""
        found: MessageT = await self._ask("GET", path, answer, doing=doing, query=query, repeat=True)
        return found

    @overload
    async def delete(self, path: str, answer: None, *, doing: str, body: BaseModel | None = None) -> None: ...
    @overload
    async def delete(
        self, path: str, answer: type[MessageT], *, doing: str, body: BaseModel | None = None
    ) -> MessageT: ...
    async def delete(
        self, path: str, answer: type[MessageT] | None, *, doing: str, body: BaseModel | None = None
    ) -> MessageT | None:
        """DELETE, repeated as GET is: what is gone stays gone."""
        found: MessageT | None = await self._ask("DELETE", path, answer, doing=doing, body=body, repeat=True)
        return found

    @overload
    async def post(
        self,
        path: str,
        answer: None,
        *,
        doing: str,
        body: BaseModel | Spooled,
        repeat: bool | None = None,
        on_sent: Callable[[int], None] = lambda _: None,
    ) -> None: ...
    @overload
    async def post(
        self,
        path: str,
        answer: type[MessageT],
        *,
        doing: str,
        body: BaseModel | Spooled,
        repeat: bool | None = None,
        on_sent: Callable[[int], None] = lambda _: None,
    ) -> MessageT: ...
    async def post(
        self,
        path: str,
        answer: type[MessageT] | None,
        *,
        doing: str,
        body: BaseModel | Spooled,
        repeat: bool | None = None,
        on_sent: Callable[[int], None] = lambda _: None,
    ) -> MessageT | None:
        """POST, under one idempotency key. `repeat` says whether it may be sent again when its outcome is unknown; None
        where the service knows idempotency keys. One that was surely not taken is always sent again.

        Raises OutcomeUnknown for one that may have worked.
        """
        if repeat is None:
            repeat = await self._service.capabilities(self) is not None
        found: MessageT | None = await self._ask(
            "POST", path, answer, doing=doing, body=body, repeat=repeat, on_sent=on_sent
        )
        return found

    async def capabilities(self) -> wire.Capabilities | None:
        """The answer to CAPABILITIES, None from a service that has no such address."""
        try:
            return await self.get(wire.CAPABILITIES, wire.Capabilities, doing="asking what the service can do")
        except ServiceRefused as error:
            if error.status in (403, 404, 405):
                return None
            raise
        except _NotOurs:
            return None

    @asynccontextmanager
    async def download(self, path: str, *, start: int, doing: str) -> AsyncIterator[httpx.Response]:
        """A response whose body is still to be read, from byte `start` on. Its status is 200 or 206."""
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
        async with self._http.stream("GET", f"{self._service.base_url}{path}", headers=headers) as response:
            if response.status_code not in (200, 206):
                raise self._refusal(response.status_code, await response.aread(), doing)
            yield response

    async def _ask(
        self,
        method: str,
        path: str,
        answer: type[MessageT] | None,
        *,
        doing: str,
        repeat: bool,
        query: BaseModel | None = None,
        body: BaseModel | Spooled | None = None,
        on_sent: Callable[[int], None] = lambda _: None,
    ) -> Any:
        patience, service = self._service.patience, self._service
        headers = {wire.IDEMPOTENCY_KEY: uuid4().hex} if method == "POST" else {}
        if isinstance(body, Spooled):
            headers |= body.headers()
        elif body is not None:
            headers["Content-Type"] = "application/json"

        async def attempt() -> Any:
            content: Any = None
            if isinstance(body, Spooled):
                content = body.pieces(on_sent)
            elif body is not None:
                content = body.model_dump_json(exclude_none=True).encode()
            params = None if query is None else query.model_dump(mode="json", exclude_none=True)
            request = self._http.build_request(
                method,
                f"{service.base_url}{path}",
                params=params,
                headers=headers,
                content=content,
                timeout=_UPLOAD if isinstance(body, Spooled) else _TIMEOUT,
            )
            return await self._once(request, answer, doing=doing, repeat=repeat)

        limited = 0

        def over(state: RetryCallState) -> bool:
            nonlocal limited
            failed = _failed(state)
            # A service that was away before isn't broken for that.
            limited += failed.most is not None
            limit_s = patience.request_s if service.reached else patience.first_s
            passed_s = state.seconds_since_start or 0.0
            return passed_s >= limit_s or (failed.most is not None and limited >= failed.most)

        def wait(state: RetryCallState) -> float:
            asked_s = _failed(state).after_s
            return patience.pause(state.attempt_number) if asked_s is None else asked_s + patience.pause(1)

        def tell(state: RetryCallState) -> None:
            self._say(f"{_failed(state).error} Trying again.")

        try:
            return await AsyncRetrying(
                retry=lambda state: isinstance(state.outcome and state.outcome.exception(), _Failed),
                stop=over,
                wait=wait,
                before_sleep=tell,
                reraise=True,
                sleep=asyncio.sleep,
            )(attempt)
        except _Failed as failed:
            raise failed.error from failed.__cause__

    async def _once(
        self, request: httpx.Request, answer: type[MessageT] | None, *, doing: str, repeat: bool
    ) -> MessageT | None:
        try:
            response = await self._http.send(request)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError) as error:
            # It never left.
            words = f"{doing}: {self._service.base_url} can't be reached: {self._said(error)}."
            if "CERTIFICATE_VERIFY_FAILED" in words:
                raise ServiceUnreachable(
                    f"{words} Its certificate isn't trusted here. When it is your own server's, name the file of its"
                    " certificate in SSL_CERT_FILE."
                ) from error
            raise _Failed(ServiceUnreachable(words)) from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise self._unanswered(doing, f"the connection broke: {self._said(error)}", repeat) from error
        self._service.answered()
        status = response.status_code
        if status in NOT_TAKEN:
            raise _Failed(self._refusal(status, response.content, doing), after_s=_retry_after_s(response))
        if status in _GATEWAYS or status >= 500:
            said = self._refusal(status, response.content, doing)
            if status == 501:
                raise said
            if not repeat:
                raise self._unanswered(doing, str(said), repeat)
            raise _Failed(said, most=None if status in _GATEWAYS else _MOST_500S)
        if not 200 <= status < 300:
            raise self._refusal(status, response.content, doing)
        if answer is None:
            return None
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            # What is remembered of a service may not come of an answer that was cut.
            broken_off = error.errors()[0]["type"] == "json_invalid" and "json" in response.headers.get(
                "Content-Type", ""
            )
            if answer is wire.Capabilities and not broken_off:
                raise _NotOurs from error
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors()[:3])
            broken = self._unanswered(doing, f"its answer can't be read: {wrong}", repeat)
            if isinstance(broken, _Failed):
                broken.most = _MOST_500S
            raise broken from error

    def _unanswered(self, doing: str, why: str, repeat: bool) -> Exception:
        where = self._service.base_url
        if repeat:
            return _Failed(ServiceUnreachable(f"{doing}: {where} gave no answer: {why.rstrip('.')}."))
        return OutcomeUnknown(
            f"{doing}: {where} gave no answer: {why.rstrip('.')}. It may have been done all the same, and this service"
            " doesn't say how a request is repeated safely, so it was not sent again."
        )

    def _refusal(self, status: int, body: bytes, doing: str) -> Exception:
        return refusal(status, body, doing=doing, base_url=self._service.base_url, key=self._key)

    def _said(self, error: Exception) -> str:
        return without_key(str(error) or type(error).__name__, self._key).rstrip(".")


class _NotOurs(Exception):
    """Something answers under the address that is no answer of the wire's."""


def _failed(state: RetryCallState) -> _Failed:
    error = state.outcome.exception() if state.outcome is not None else None
    if not isinstance(error, _Failed):
        raise AssertionError("only a failed attempt is repeated")
    return error


def _retry_after_s(response: httpx.Response) -> float | None:
    try:
        seconds = float(response.headers["Retry-After"])
    except (KeyError, ValueError):
        return None
    return min(seconds, _LONGEST_RETRY_AFTER_S) if seconds >= 0 else None
