"""The answers to requests that make something, by their idempotency key: a repeated request gets the same answer.

Knows no address; a request is its digest.
"""

from __future__ import annotations

import hashlib
import time

from sqlalchemy import Engine, delete, insert, select

from .database import ANSWERS, reading

KEPT_S = 7 * 24 * 3600.0


class KeyReused(ValueError):
    """The key was used for another request."""


def digest_of(method: str, path: str, body: bytes) -> str:
    """What makes two requests the same."""
    return hashlib.sha256(b"\0".join((method.encode(), path.encode(), body))).hexdigest()


def answer_of(engine: Engine, entity: str, key: str, digest: str) -> str | None:
    """The answer that was given under this key, None when there was none yet. Raises KeyReused."""
    with reading(engine) as connection:
        row = connection.execute(
            select(ANSWERS).where(ANSWERS.c.entity == entity, ANSWERS.c.idempotency_key == key)
        ).one_or_none()
    if row is not None and row.request_digest != digest:
        raise KeyReused(f"the idempotency key {key!r} was used for another request; a new request needs a new key")
    return None if row is None else str(row.body)


def keep_answer(engine: Engine, entity: str, key: str, digest: str, body: str) -> None:
    """Remember an answer; the first one stays. Those that are a week old go."""
    now = time.time()
    of_key = (ANSWERS.c.entity == entity) & (ANSWERS.c.idempotency_key == key)
    with engine.begin() as connection:
        connection.execute(delete(ANSWERS).where(ANSWERS.c.created_at < now - KEPT_S))
        if connection.execute(select(ANSWERS.c.entity).where(of_key)).first() is None:
            values = {"entity": entity, "idempotency_key": key, "request_digest": digest, "body": body}
            connection.execute(insert(ANSWERS).values(created_at=now, **values))
