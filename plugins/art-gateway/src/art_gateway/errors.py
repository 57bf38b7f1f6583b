"""The gateway's own errors, in the form that every OpenAI client understands."""

from __future__ import annotations

import math
from typing import Any

import orjson
from starlette.types import Send


class ApiError(Exception):
    """An answer that says why not. `status` is HTTP's, `code` a fixed word, `param` the request's field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        self.status, self.message, self.code, self.type, self.param = status, message, code, type, param
        self.headers = headers
        if retry_after_s is not None:
            self.headers = (*headers, (b"retry-after", b"%d" % max(1, math.ceil(retry_after_s))))
        super().__init__(message)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    async def send(self, send: Send) -> None:
        """Answer with it."""
        await send_bytes(send, self.status, orjson.dumps(self.body), headers=self.headers)


def engine_error(status: int, message: str, *, code: str, retry_after_s: float | None = None) -> ApiError:
    """An error on the engine's side of the gateway."""
    return ApiError(status, message, code=code, type="server_error", retry_after_s=retry_after_s)


async def send_bytes(
    send: Send,
    status: int,
    content: bytes,
    *,
    content_type: bytes = b"application/json",
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> None:
    """One whole answer."""
    length = (b"content-length", b"%d" % len(content))
    all_headers = [(b"content-type", content_type), length, *headers]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": content})
