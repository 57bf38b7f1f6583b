"""API keys: each opens one entity, and only its hash is stored. Knows no HTTP."""

from __future__ import annotations

import hmac
import re
import secrets
import time
from dataclasses import dataclass
from hashlib import sha256

from sqlalchemy import Engine, insert, select, update

from art_core.names import check_name

from .database import KEYS, reading

_PREFIX = "art"
# Nothing else reaches the database, which may not even take it as text.
_FORM = re.compile(rf"{_PREFIX}-([0-9a-f]{{16}})-([0-9a-f]{{64}})", re.ASCII)
# Compared with when there is no such key, so that an unknown id takes the way of a known one.
_NO_DIGEST = "0" * 64


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """What may be shown of a key."""

    id: str
    entity: str
    created_at: float
    revoked_at: float | None


def create_key(engine: Engine, entity: str) -> str:
    """Make a key for an entity and give its text, which can't be read again. Raises InvalidName."""
    check_name(entity, what="name of an entity")
    key_id, secret = secrets.token_hex(8), secrets.token_hex(32)
    with engine.begin() as connection:
        connection.execute(
            insert(KEYS).values(id=key_id, entity=entity, digest=_digest(secret), created_at=time.time())
        )
    return f"{_PREFIX}-{key_id}-{secret}"


def list_keys(engine: Engine) -> list[ApiKey]:
    """Every key, revoked ones too, oldest first."""
    columns = (KEYS.c.id, KEYS.c.entity, KEYS.c.created_at, KEYS.c.revoked_at)
    with reading(engine) as connection:
        rows = connection.execute(select(*columns).order_by(KEYS.c.created_at)).all()
    return [ApiKey(id=key_id, entity=entity, created_at=made, revoked_at=gone) for key_id, entity, made, gone in rows]


def revoke_key(engine: Engine, key_id: str) -> bool:
    """Close a key by its id. False when there is no such key that is open."""
    open_key = (KEYS.c.id == key_id) & KEYS.c.revoked_at.is_(None)
    with engine.begin() as connection:
        return connection.execute(update(KEYS).where(open_key).values(revoked_at=time.time())).rowcount == 1


def entity_of(engine: Engine, text: str) -> str | None:
    """The entity that a key's text opens; None for one that is malformed, unknown, wrong or revoked."""
    written = _FORM.fullmatch(text)
    key_id, secret = (written[1], written[2]) if written else ("", "")
    with reading(engine) as connection:
        row = connection.execute(
            select(KEYS.c.entity, KEYS.c.digest).where(KEYS.c.id == key_id, KEYS.c.revoked_at.is_(None))
        ).one_or_none()
    same = hmac.compare_digest(row.digest if row else _NO_DIGEST, _digest(secret))
    return str(row.entity) if row and same and written else None


def _digest(secret: str) -> str:
    # The secret is 256 random bits: a slow hash would protect nothing more.
    return sha256(secret.encode(errors="surrogatepass")).hexdigest()
