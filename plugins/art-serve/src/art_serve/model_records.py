"""Which models there are, whose they are, and the steps that are kept of each. Knows no backend.

A model's id is never used again, not even for another of the same name, so that nothing of a deleted model comes back.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Engine, Row, delete, insert, select, update

from art_core.names import check_name

from .database import CHECKPOINTS, MODELS, reading

_OF_A_NAME = 40


class NameTaken(ValueError):
    """The entity has a model of this name in the project already."""


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """A model of an entity. `base_model` is as the client named it."""

    id: str
    entity: str
    project: str
    name: str
    base_model: str

    @property
    def backend_project(self) -> str:
        """The project under which a backend knows it: readable, and unlike any other model's by the id in it."""
        return f"{self.entity[:_OF_A_NAME]}.{self.project[:_OF_A_NAME]}.{self.id}"


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """A step that is kept, with the metrics of the job that made it."""

    step: int
    metrics: dict[str, float | None]


def create_model(
    engine: Engine, *, entity: str, project: str, name: str, base_model: str, return_existing: bool = False
) -> tuple[ModelRecord, bool]:
    """Make a model, or give the one of that name, and whether it is new.

    Raises InvalidName, and NameTaken when there is one and `return_existing` is false or its base model is another.
    """
    check_name(entity, what="name of an entity")
    check_name(project, what="project")
    check_name(name, what="model name")
    with engine.begin() as connection:
        row = connection.execute(
            select(MODELS).where(*_live(entity), MODELS.c.project == project, MODELS.c.name == name)
        ).one_or_none()
        if row is not None:
            if not return_existing:
                raise NameTaken(f"there is a model {name!r} in project {project!r} already; ask with return_existing")
            if row.base_model != base_model:
                raise NameTaken(
                    f"the model {name!r} in project {project!r} has the base model {row.base_model!r}, not"
                    f" {base_model!r}; give the new one another name"
                )
            return _record(row), False
        values = {"entity": entity, "project": project, "name": name, "base_model": base_model}
        model_id = uuid.uuid4().hex
        connection.execute(insert(MODELS).values(id=model_id, created_at=time.time(), **values))
        return ModelRecord(id=model_id, **values), True


def delete_model(engine: Engine, model_id: str) -> None:
    """Forget a model and its steps; what the backend keeps of it is not touched."""
    with engine.begin() as connection:
        connection.execute(update(MODELS).where(MODELS.c.id == model_id).values(deleted_at=time.time()))
        connection.execute(delete(CHECKPOINTS).where(CHECKPOINTS.c.model_id == model_id))


def all_models(engine: Engine) -> list[ModelRecord]:
    """Every model of every entity that isn't deleted."""
    with reading(engine) as connection:
        return [_record(row) for row in connection.execute(select(MODELS).where(MODELS.c.deleted_at.is_(None)))]


def latest_steps(engine: Engine) -> dict[str, int]:
    """The highest step of each model, by its id."""
    latest: dict[str, int] = {}
    with reading(engine) as connection:
        for model_id, step in connection.execute(select(CHECKPOINTS.c.model_id, CHECKPOINTS.c.step)):
            latest[model_id] = max(step, latest.get(model_id, 0))
    return latest


def keep_checkpoint(engine: Engine, model_id: str, step: int, metrics: Mapping[str, float | None]) -> None:
    """Remember a step and its metrics; again, it changes nothing."""
    with engine.begin() as connection:
        if connection.execute(_of_step(model_id, step)).first() is None:
            _insert_checkpoint(connection, model_id, step, metrics)


def hold_to(engine: Engine, model_id: str, steps: Iterable[int]) -> None:
    """Make the steps that are remembered those that the backend has."""
    there = set(steps)
    with engine.begin() as connection:
        known = set(connection.execute(select(CHECKPOINTS.c.step).where(CHECKPOINTS.c.model_id == model_id)).scalars())
        for step in there - known:
            _insert_checkpoint(connection, model_id, step, {})
        _delete_checkpoints(connection, model_id, known - there)


def forget_checkpoints(engine: Engine, model_id: str, steps: Iterable[int]) -> None:
    """Forget steps that are gone."""
    with engine.begin() as connection:
        _delete_checkpoints(connection, model_id, steps)


def checkpoint_metrics(engine: Engine, model_id: str, step: int) -> dict[str, float | None] | None:
    """What was remembered of a step; None when it isn't."""
    with reading(engine) as connection:
        found = connection.execute(_of_step(model_id, step)).first()
    return None if found is None else json.loads(found.metrics)


def checkpoints_page(
    engine: Engine, model_id: str, *, after: int | None, limit: int, order: Literal["asc", "desc"]
) -> tuple[list[CheckpointRecord], bool]:
    """At most `limit` steps behind the step `after`, in the order asked for, and whether there are more."""
    wanted = select(CHECKPOINTS.c.step, CHECKPOINTS.c.metrics).where(CHECKPOINTS.c.model_id == model_id)
    if after is not None:
        wanted = wanted.where(CHECKPOINTS.c.step > after if order == "asc" else CHECKPOINTS.c.step < after)
    wanted = wanted.order_by(CHECKPOINTS.c.step.asc() if order == "asc" else CHECKPOINTS.c.step.desc())
    with reading(engine) as connection:
        rows = connection.execute(wanted.limit(limit + 1)).all()
    found = [CheckpointRecord(step=step, metrics=json.loads(metrics)) for step, metrics in rows[:limit]]
    return found, len(rows) > limit


def _insert_checkpoint(connection: Connection, model_id: str, step: int, metrics: Mapping[str, float | None]) -> None:
    values = {"model_id": model_id, "step": step, "metrics": json.dumps(dict(metrics)), "created_at": time.time()}
    connection.execute(insert(CHECKPOINTS).values(**values))


def _delete_checkpoints(connection: Connection, model_id: str, steps: Iterable[int]) -> None:
    gone = (CHECKPOINTS.c.model_id == model_id) & CHECKPOINTS.c.step.in_(list(steps))
    connection.execute(delete(CHECKPOINTS).where(gone))


def _of_step(model_id: str, step: int) -> Any:
    return select(CHECKPOINTS).where(CHECKPOINTS.c.model_id == model_id, CHECKPOINTS.c.step == step)


def _live(entity: str) -> tuple[Any, ...]:
    return MODELS.c.deleted_at.is_(None), MODELS.c.entity == entity


def _record(row: Row[Any]) -> ModelRecord:
    return ModelRecord(id=row.id, entity=row.entity, project=row.project, name=row.name, base_model=row.base_model)
