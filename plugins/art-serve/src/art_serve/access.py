"""Who may come in: the key of each request becomes an entity before anything of the request is read.

A header that names an entity means nothing here; only the key does.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from hashlib import sha256

from starlette.types import ASGIApp, Receive, Scope, Send

from art_gateway.errors import ApiError

from .in_threads import Transactions
from .keys import entity_of
from .request_rate import RequestRate

# How long a key that was revoked by another process may still be taken for good.
_REMEMBERED_S = 2.0
_MOST = 4096
OPEN = frozenset({"/health", "/ready", "/docs", "/openapi.json"})


class Access:
    """The entity behind an Authorization header, remembered for two seconds."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions
        self._known: OrderedDict[bytes, tuple[float, str | None]] = OrderedDict()

    async def entity(self, authorization: str) -> str | None:
        """The entity, or None."""
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key:
            return None
        # Kept by its hash: a secret isn't left in memory for longer than the request.
        digest = sha256(key.strip().encode(errors="surrogatepass")).digest()
        now = time.monotonic()
        known = self._known.get(digest)
        if known is not None and known[0] > now:
            return known[1]
        entity = await self._transactions(entity_of, key.strip())
        self._known[digest] = (now + _REMEMBERED_S, entity)
        self._known.move_to_end(digest)
        while len(self._known) > _MOST:
            self._known.popitem(last=False)
        return entity


class RequireKey:
    """Lets nothing but `OPEN` addresses pass without a key, nor more of one entity than its rate."""

    def __init__(self, app: ASGIApp, *, access: Access, rate: RequestRate) -> None:
        self._app = app
        self._access = access
        self._rate = rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass it on, or refuse it."""
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        entity = await self._access.entity(given[0].decode("latin-1")) if len(given) == 1 else None
        if entity is None:
            await ApiError(
                401,
                "The API key is missing or wrong. Send 'Authorization: Bearer KEY'; whoever runs this server makes keys"
                " by: art serve keys create ENTITY",
                code="invalid_api_key",
                headers=((b"www-authenticate", b"Bearer"),),
            ).send(send)
            return
        wait_s = self._rate.take(entity)
        if wait_s > 0:
            message = f"The entity {entity!r} asks more often than {self._rate.per_s:g} times a second."
            await ApiError(429, message, code="too_many_requests", retry_after_s=wait_s).send(send)
            return
        scope.setdefault("state", {})["entity"] = entity
        await self._app(scope, receive, send)
