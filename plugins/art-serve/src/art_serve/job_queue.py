"""The queue of jobs: which waits, which runs, and who may say that it ended. Knows no backend and not what a payload
holds.

One job runs at a time. A worker holds it by a lease that heartbeats renew; when the lease runs out, the job is given to
the next who asks, before any that waits.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Engine, Row, func, insert, select, update

from .database import JOBS, reading
from .job_events import NewEvent, add_events

# So many are told each place that they come to.
_NEAR = 16


class JobState(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it is now. `step` is fixed when it first runs; `error` is the reason of one that failed."""

    id: str
    entity: str
    model_id: str
    payload: str
    state: JobState
    step: int | None
    error: str | None


class QueueFull(RuntimeError):
    """So many jobs wait already that no other is taken."""


class LeaseLost(RuntimeError):
    """The worker doesn't hold the job any more: it must let go of it and change nothing."""


def submit(
    engine: Engine,
    *,
    entity: str,
    model_id: str,
    idempotency_key: str,
    payload: str,
    most_waiting: int | None = None,
) -> Job:
    """Queue a job. When the model has one under this key already, that one is given and nothing is queued.

    Raises ValueError when the key was used for another payload, QueueFull when `most_waiting` jobs of the entity wait
    already.
    """
    with engine.begin() as connection:
        known = JOBS.c.idempotency_key == idempotency_key, JOBS.c.model_id == model_id, JOBS.c.entity == entity
        row = connection.execute(select(JOBS).where(*known)).one_or_none()
        if row is None:
            waiting = _waiting(connection, entity)
            if most_waiting is not None and waiting >= most_waiting:
                raise QueueFull(f"{waiting} jobs of {entity!r} wait already, as many as may; come back when some ended")
            values = {"entity": entity, "model_id": model_id, "idempotency_key": idempotency_key, "payload": payload}
            job_id = uuid.uuid4().hex
            connection.execute(insert(JOBS).values(id=job_id, state=JobState.QUEUED, **values))
            row = _row(connection, job_id)
            add_events(connection, job_id, [("queued", {"place": _place(connection, row)})])
    if row.payload != payload:
        raise ValueError(
            f"the idempotency key {idempotency_key!r} was used for another job ({row.id}) of this model; a new job"
            " needs a new key"
        )
    return _job(row)


def claim(engine: Engine, worker: str, *, lease_s: float, now: float | None = None) -> Job | None:
    """Take the next job for `lease_s` seconds; None when one runs under a live lease or none waits.

    `worker` is a name that no other process ever has. A job whose lease ran out comes first, then the oldest of the
    entity that was served longest ago. `now` is the time since the epoch, in seconds.
    """
    now = time.time() if now is None else now
    with engine.begin() as connection:
        running = connection.execute(select(JOBS).where(JOBS.c.state == JobState.RUNNING)).one_or_none()
        if running is not None and running.lease_until > now:
            return None
        chosen = running or _next_in_turn(connection)
        if chosen is None:
            return None
        connection.execute(
            update(JOBS)
            .where(JOBS.c.id == chosen.id)
            .values(state=JobState.RUNNING, worker=worker, lease_until=now + lease_s, started_at=now)
        )
        return _job(_row(connection, chosen.id))


def tell_places(engine: Engine) -> Sequence[str]:
    """Tell jobs that wait where they are now, each of the first and now and then one further behind. Gives their
    ids.
    """
    waiting = select(JOBS.c.id, JOBS.c.entity).where(JOBS.c.state == JobState.QUEUED).order_by(JOBS.c.number)
    with engine.begin() as connection:
        rows = connection.execute(waiting).all()
        counts, own, told = Counter(row.entity for row in rows), Counter[str](), []
        for row in rows:
            own[row.entity] += 1
            place = own[row.entity] + _before(own[row.entity], (n for who, n in counts.items() if who != row.entity))
            if place <= _NEAR or not place % _NEAR:
                add_events(connection, row.id, [("queued", {"place": place})])
                told.append(row.id)
        return told


def heartbeat(engine: Engine, job_id: str, worker: str, *, lease_s: float, now: float | None = None) -> None:
    """Hold the job for `lease_s` seconds from now. Raises LeaseLost."""
    until = (time.time() if now is None else now) + lease_s
    with engine.begin() as connection:
        _held(connection, job_id, worker)
        connection.execute(update(JOBS).where(JOBS.c.id == job_id).values(lease_until=until))


def fix_step(engine: Engine, job_id: str, worker: str, step: int, *, events: Sequence[NewEvent] = ()) -> int:
    """Fix the step that the job makes and give it: the one fixed by the first worker, when there was one. `events` are
    told the first time only. Raises LeaseLost.
    """
    with engine.begin() as connection:
        held = _held(connection, job_id, worker)
        if held.step is not None:
            return int(held.step)
        connection.execute(update(JOBS).where(JOBS.c.id == job_id).values(step=step))
        add_events(connection, job_id, events)
    return step


def finish(
    engine: Engine, job_id: str, worker: str, *, error: str | None = None, events: Sequence[NewEvent] = ()
) -> None:
    """End the job: failed when there is an error, else succeeded; `events` are told with it, or not at all. Raises
    LeaseLost.
    """
    state = JobState.SUCCEEDED if error is None else JobState.FAILED
    with engine.begin() as connection:
        _held(connection, job_id, worker)
        connection.execute(
            update(JOBS).where(JOBS.c.id == job_id).values(state=state, error=error, worker=None, lease_until=None)
        )
        add_events(connection, job_id, events)


def release_leases(engine: Engine, workers: str) -> int:
    """Give back what workers hold whose names begin with `workers`, all of which are known to be dead; says how many
    jobs. The next claim takes them up under their fixed steps.
    """
    held = (JOBS.c.state == JobState.RUNNING) & JOBS.c.worker.startswith(workers, autoescape=True)
    with engine.begin() as connection:
        return int(connection.execute(update(JOBS).where(held).values(lease_until=0.0)).rowcount)


def abandon(engine: Engine, model_id: str, *, error: str) -> bool:
    """Fail every job of a model that waits. False, and nothing is done, while one of them runs."""
    with engine.begin() as connection:
        of_model = JOBS.c.model_id == model_id
        if connection.execute(select(JOBS.c.id).where(of_model, JOBS.c.state == JobState.RUNNING)).first():
            return False
        waiting = of_model & (JOBS.c.state == JobState.QUEUED)
        for job_id in connection.execute(select(JOBS.c.id).where(waiting)).scalars().all():
            add_events(connection, job_id, [("training_failed", {"error_message": error})])
        connection.execute(update(JOBS).where(waiting).values(state=JobState.FAILED, error=error))
        return True


def unfinished_payloads(engine: Engine) -> set[str]:
    """What the jobs that wait or run still need."""
    unfinished = JOBS.c.state.in_([JobState.QUEUED, JobState.RUNNING])
    with reading(engine) as connection:
        return set(connection.execute(select(JOBS.c.payload).where(unfinished)).scalars())


def count_by_state(engine: Engine) -> dict[str, int]:
    """How many jobs there are in each state."""
    with reading(engine) as connection:
        return {str(state): int(n) for state, n in connection.execute(_COUNTS)}


def place_of(engine: Engine, job: Job) -> int | None:
    """How many jobs begin before this one, itself counted, as long as it waits; in turn between entities."""
    if job.state is not JobState.QUEUED:
        return None
    with reading(engine) as connection:
        return _place(connection, _row(connection, job.id))


def find_job(engine: Engine, job_id: str, *, entity: str) -> Job | None:
    """A job of this entity; None when there is none, or it is another's."""
    with reading(engine) as connection:
        row = connection.execute(select(JOBS).where(JOBS.c.id == job_id, JOBS.c.entity == entity)).one_or_none()
    return None if row is None else _job(row)


_COUNTS = select(JOBS.c.state, func.count()).group_by(JOBS.c.state)


def _waiting(connection: Connection, entity: str) -> int:
    queued = select(func.count()).select_from(JOBS).where(JOBS.c.state == JobState.QUEUED, JOBS.c.entity == entity)
    return int(connection.execute(queued).scalar_one())


def _place(connection: Connection, row: Row[Any]) -> int:
    """Entities take turns: before the nth job of one come as many of every other, if it has them."""
    counts = select(
        func.count().filter(JOBS.c.entity == row.entity, JOBS.c.number <= row.number),
    ).where(JOBS.c.state == JobState.QUEUED)
    own = int(connection.execute(counts).scalar_one())
    others = (
        select(func.count()).where(JOBS.c.state == JobState.QUEUED, JOBS.c.entity != row.entity).group_by(JOBS.c.entity)
    )
    return own + _before(own, connection.execute(others).scalars())


def _before(own: int, others: Iterable[int]) -> int:
    """How many jobs of other entities, of which each has so many, come before the own one of this number."""
    return sum(min(own, number) for number in others)


def _next_in_turn(connection: Connection) -> Row[Any] | None:
    served = select(JOBS.c.entity, func.max(JOBS.c.started_at).label("last")).group_by(JOBS.c.entity).subquery()
    return connection.execute(
        select(JOBS)
        .join(served, served.c.entity == JOBS.c.entity)
        .where(JOBS.c.state == JobState.QUEUED)
        .order_by(served.c.last.is_not(None), served.c.last, JOBS.c.number)
        .limit(1)
    ).one_or_none()


def _held(connection: Connection, job_id: str, worker: str) -> Row[Any]:
    row = connection.execute(select(JOBS).where(JOBS.c.id == job_id)).one_or_none()
    if row is None or row.state != JobState.RUNNING or row.worker != worker:
        raise LeaseLost(
            f"the job {job_id} isn't held by {worker!r}: its lease ran out and it was given to another, or it has"
            " ended; let go of it"
        )
    return row


def _row(connection: Connection, job_id: str) -> Row[Any]:
    return connection.execute(select(JOBS).where(JOBS.c.id == job_id)).one()


def _job(row: Row[Any]) -> Job:
    return Job(
        id=row.id,
        entity=row.entity,
        model_id=row.model_id,
        payload=row.payload,
        state=JobState(row.state),
        step=row.step,
        error=row.error,
    )
