"""Reads what a client sends: in pieces, unpacked, counted while it arrives, and not for ever. Knows no address and not
what a body means.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from art_gateway.errors import ApiError

from .job_payload import invalid

MessageT = TypeVar("MessageT", bound=BaseModel)
# A piece of what a compressed body unpacks to; as much as may be in memory at once beside what is kept.
_PIECE = 2**20
_GZIP = 31
_READ_IN_THREAD = 64 * 2**10
SMALL = 2**20


@dataclass(frozen=True, kw_only=True)
class BodyLimits:
    """Sizes in bytes, after unpacking; `pause_s` between two pieces, `whole_s` for the whole body."""

    job: int = 256 * 2**20
    upload: int = 4 * 2**30
    pause_s: float = 30.0
    whole_s: float = 900.0


async def pieces_of(request: Request, *, limit: int, limits: BodyLimits) -> AsyncIterator[bytes]:
    """The body in pieces of at most a MiB, unpacked. Raises ApiError: 408, 413, 415, 400 for what is no gzip."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(limit)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip"):
        message = f"Content-Encoding {encoding[:40]!r} isn't read here; send it as it is, or by gzip."
        raise ApiError(415, message, code="unknown_encoding", param="Content-Encoding")
    unpacking = zlib.decompressobj(_GZIP) if encoding == "gzip" else None
    size = 0
    async for arrived in _arriving(request, limits):
        for piece in _unpacked(unpacking, arrived):
            size += len(piece)
            if size > limit:
                raise _too_large(limit)
            yield piece
    if unpacking is not None and not unpacking.eof:
        raise ApiError(400, "The body is gzip that ends early.", code="broken_encoding", param="Content-Encoding")


async def read_body(request: Request, *, limit: int, limits: BodyLimits) -> bytes:
    """The whole body."""
    return b"".join([piece async for piece in pieces_of(request, limit=limit, limits=limits)])


async def read_message(
    request: Request, message: type[MessageT], *, limits: BodyLimits, limit: int = SMALL
) -> MessageT:
    """The body as a message of the wire. Raises ApiError, 422 with the field at fault."""
    return await as_message(await read_body(request, limit=limit, limits=limits), message)


async def as_message(body: bytes, message: type[MessageT]) -> MessageT:
    """A body as a message of the wire. Raises ApiError, 422 with the field at fault."""
    if len(body) > _READ_IN_THREAD:
        return await asyncio.to_thread(message_of, body, message)
    return message_of(body, message)


def message_of(body: bytes, message: type[MessageT]) -> MessageT:
    """`as_message` for whoever is in a thread already."""
    try:
        return message.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise invalid(error) from error


async def _arriving(request: Request, limits: BodyLimits) -> AsyncIterator[bytes]:
    stream = request.stream()
    deadline = asyncio.get_running_loop().time() + limits.whole_s
    while True:
        try:
            async with asyncio.timeout_at(min(deadline, asyncio.get_running_loop().time() + limits.pause_s)):
                piece = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            message = f"The body came too slowly: {limits.pause_s:g} s without a byte, or {limits.whole_s:g} s in all."
            raise ApiError(408, message, code="request_timeout") from None
        except ClientDisconnect:
            raise ApiError(400, "The client went away before its body was whole.", code="client_gone") from None
        yield piece


def _unpacked(unpacking: Any, arrived: bytes) -> Iterator[bytes]:
    """What a piece of gzip unpacks to, a MiB at a time, so that a bomb is noticed before it fills the memory."""
    if unpacking is None:
        yield arrived
        return
    left = arrived
    while True:
        if left and unpacking.eof:
            raise ApiError(400, "Something follows the end of the gzip body.", code="broken_encoding")
        try:
            piece: bytes = unpacking.decompress(left, _PIECE)
        except zlib.error as error:
            message = f"The body is not gzip: {error}."
            raise ApiError(400, message, code="broken_encoding", param="Content-Encoding") from error
        left = unpacking.unconsumed_tail or unpacking.unused_data
        if piece:
            yield piece
        if not left and len(piece) < _PIECE:
            return


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than {limit // 2**20} MiB.", code="request_too_large")
