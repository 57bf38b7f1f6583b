"""A middleware for vLLM's server: asks for the API key on every path but the health check.

vLLM itself guards /v1 only, while /pause, /sleep and its other development endpoints stay open to every user of the
machine. Runs in vLLM's environment, with nothing of ART.
"""

import hashlib
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_OPEN = ("/health", "/ping", "/version")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


class RequireKey:
    """Answers 401 to what has no or a wrong bearer token, once VLLM_API_KEY is set."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app
        self.expected = _digest(f"bearer {os.environ['VLLM_API_KEY']}")

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] in _OPEN or self._has_key(scope):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        body = b'{"error": {"message": "The API key is missing or wrong.", "code": 401}}'
        await send({"type": "http.response.body", "body": body})

    def _has_key(self, scope: Message) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"").decode("latin-1")
        scheme, _, key = given.partition(" ")
        return secrets.compare_digest(_digest(f"{scheme.lower()} {key}"), self.expected)
