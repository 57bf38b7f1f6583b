"""What the wire's addresses have in common: how a body is documented, errors, ids in pages, and answers given once."""

from __future__ import annotations

import asyncio
import errno
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel

from art_backend_serverless import wire
from art_gateway.errors import ApiError

from .repeated_requests import KeyReused, answer_of, digest_of, keep_answer
from .service import Service

AnswerT = TypeVar("AnswerT", bound=BaseModel)
_KEY = re.compile(r"[\x21-\x7e]{1,128}")
_NUMBER = re.compile(r"[0-9]{1,9}")

#: Errors of the machine that end when somebody makes room.
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

#: What each address may answer besides, for the OpenAPI page.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": wire.Error, "description": words}
    for status, words in {
        400: "the body can't be read",
        401: "no key, or a wrong one",
        404: "there is no such thing, or it is another entity's",
        408: "the body came too slowly",
        409: "it conflicts with what is there",
        413: "the body is too large",
        415: "the body's encoding isn't read here",
        422: "a field is wrong, or the backend can't do this; the message says which",
        429: "too much at once; Retry-After says when to come back",
        503: "not now; Retry-After says when to come back",
    }.items()
}


def body_of(message: type[BaseModel], **fields: Mapping[str, Any]) -> dict[str, Any]:
    """For a route's decorator: the body that it reads by itself, since it counts and unpacks what arrives. `fields`
    adds to what the message's schema says of these.
    """
    content = schema_of(message)
    for field, more in fields.items():
        content["properties"][field] |= more
    body = {"required": True, "content": {"application/json": {"schema": content}}}
    return {"openapi_extra": {"requestBody": body}}


def schema_of(message: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a message, without references to what isn't in the document."""
    schema = message.model_json_schema()
    found: dict[str, Any] = _inlined(schema, schema.pop("$defs", {}))
    return found


def leading_to(*operations: str, **given: str) -> dict[int | str, dict[str, Any]]:
    """For a route's decorator: to which other addresses its answer leads, by which field of it."""
    parameters = {name: f"$response.body#/{field}" for name, field in given.items()}
    links: dict[str, Any] = {name: {"operationId": name, "parameters": parameters} for name in operations}
    return {200: {"links": links}}


def idempotency_key(request: Request) -> str | None:
    """The request's key, None when there is none. Raises ApiError, 422."""
    key = request.headers.get(wire.IDEMPOTENCY_KEY)
    if key is not None and not _KEY.fullmatch(key):
        message = f"{wire.IDEMPOTENCY_KEY} must be 1 to 128 letters, digits and signs, without spaces."
        raise ApiError(422, message, code="invalid_request", param=wire.IDEMPOTENCY_KEY)
    return key


def new_key() -> str:
    """A key for a request that came without one."""
    return uuid.uuid4().hex


async def once(
    service: Service, request: Request, body: bytes, answer: type[AnswerT], make: Callable[[], Awaitable[AnswerT]]
) -> AnswerT:
    """What `make` gives, or what it gave when the same request came under this key before. Raises ApiError, 409."""
    key = idempotency_key(request)
    if key is None:
        return await make()
    entity: str = request.state.entity
    digest = digest_of(request.method, request.url.path, body)
    async with _turn(service, entity, key):
        try:
            known = await service.transactions(answer_of, entity, key, digest)
        except KeyReused as error:
            raise key_reused(error) from error
        if known is not None:
            return answer.model_validate_json(known)
        made = await make()
        await service.transactions(keep_answer, entity, key, digest, made.model_dump_json())
        return made


def key_reused(error: ValueError) -> ApiError:
    """409 for a key that was used for something else."""
    return ApiError(409, str(error), code="idempotency_key_reused", param=wire.IDEMPOTENCY_KEY)


def step_id(model_id: str, step: int) -> str:
    """The id of a checkpoint in a page."""
    return f"{model_id}-{step}"


def step_of(checkpoint_id: str, model_id: str) -> int:
    """The step of a checkpoint's id. Raises ApiError, 422."""
    model, _, step = checkpoint_id.rpartition("-")
    if model != model_id or not _NUMBER.fullmatch(step):
        raise ApiError(422, "after: is no id of a checkpoint of this model", code="invalid_request", param="after")
    return int(step)


def number_of(event_id: str) -> int:
    """The number of an event's id. Raises ApiError, 422."""
    if not _NUMBER.fullmatch(event_id):
        raise ApiError(422, "after: is no id of an event", code="invalid_request", param="after")
    return int(event_id)


def _turn(service: Service, entity: str, key: str) -> asyncio.Lock:
    return service.turns.setdefault((entity, key), asyncio.Lock())


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _inlined(value, definitions) for name, value in schema.items()}
