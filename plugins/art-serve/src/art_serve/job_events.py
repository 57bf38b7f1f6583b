"""What was told of each job, in order, and pages of it. Knows no job's state and not who reads."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from sqlalchemy import Connection, Engine, func, insert, select

from .database import EVENTS, reading

NewEvent: TypeAlias = tuple[str, Mapping[str, Any]]
# Further than any number in the table, and within what both databases can compare with.
_NEVER = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """One event; `number` rises, and is never used for another."""

    number: int
    type: str
    data: dict[str, Any]


def add_events(connection: Connection, job_id: str, events: Sequence[NewEvent]) -> None:
    """Tell more of a job, within a transaction."""
    if events:
        now = time.time()
        rows = [{"job_id": job_id, "type": kind, "data": json.dumps(data), "created_at": now} for kind, data in events]
        connection.execute(insert(EVENTS), rows)


def tell(engine: Engine, job_id: str, *events: NewEvent) -> None:
    """Tell more of a job."""
    with engine.begin() as connection:
        add_events(connection, job_id, events)


def events_after(engine: Engine, job_id: str, *, after: int, limit: int) -> tuple[list[JobEvent], bool]:
    """At most `limit` events behind the number `after`, and whether there are more."""
    wanted = (
        select(EVENTS.c.number, EVENTS.c.type, EVENTS.c.data)
        .where(EVENTS.c.job_id == job_id, EVENTS.c.number > min(after, _NEVER))
        .order_by(EVENTS.c.number)
        .limit(limit + 1)
    )
    with reading(engine) as connection:
        rows = connection.execute(wanted).all()
    events = [JobEvent(number=number, type=kind, data=json.loads(data)) for number, kind, data in rows[:limit]]
    return events, len(rows) > limit


def last_number(engine: Engine, job_id: str) -> int:
    """The number of the last event of a job, 0 when there is none."""
    with reading(engine) as connection:
        last = connection.execute(select(func.max(EVENTS.c.number)).where(EVENTS.c.job_id == job_id)).scalar()
    return int(last or 0)
