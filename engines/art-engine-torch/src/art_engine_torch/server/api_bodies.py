"""Reads the JSON of requests and writes that of answers. Knows bytes and JSON, and no field."""

from __future__ import annotations

from typing import Any, Final

import orjson
from starlette.requests import Request
from starlette.responses import Response

from .api_errors import ApiError, bad_request

MOST_BYTES: Final = 64 << 20


async def read_body(request: Request, *, optional: bool = False) -> dict[str, Any]:
    """The object in a request's body, which may be empty if `optional`. Raises ApiError 400 or 413."""
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > MOST_BYTES:
            raise ApiError(413, f"The request is larger than {MOST_BYTES >> 20} MiB.", code="request_too_large")
        pieces.append(piece)
    if optional and not size:
        return {}
    try:
        body = orjson.loads(b"".join(pieces))
    except orjson.JSONDecodeError as error:
        raise bad_request(f"The body is not JSON: {error}.") from None
    if not isinstance(body, dict):
        raise bad_request("The body must be a JSON object.")
    return body


def json_response(body: dict[str, Any], status: int = 200) -> Response:
    """An answer."""
    return Response(orjson.dumps(body), status, media_type="application/json")


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"
