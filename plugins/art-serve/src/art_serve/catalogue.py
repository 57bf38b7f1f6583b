"""Every model that is served here, in memory: whose it is, and its latest step. The table is written first, then this.

One server has a database to itself, so nobody else changes the models under it. Knows no backend.
"""

from __future__ import annotations

from typing import Self

from art_gateway.errors import ApiError

from .in_threads import Transactions
from .model_records import ModelRecord, NameTaken, all_models, create_model, delete_model, latest_steps

MODEL_NOT_FOUND = "there is no such model"


class Catalogue:
    """Models by id and by name. What belongs to another entity is not there, for whoever asks."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions
        self._by_id: dict[str, ModelRecord] = {}
        self._by_name: dict[tuple[str, str, str], ModelRecord] = {}
        self._latest: dict[str, int] = {}

    @classmethod
    async def read(cls, transactions: Transactions) -> Self:
        """Read the table."""
        catalogue = cls(transactions)
        for record in await transactions(all_models):
            catalogue._add(record)
        catalogue._latest = await transactions(latest_steps)
        return catalogue

    def __len__(self) -> int:
        return len(self._by_id)

    def of(self, entity: str) -> list[ModelRecord]:
        """The models of an entity, by name."""
        own = (record for record in self._by_id.values() if record.entity == entity)
        return sorted(own, key=lambda record: (record.project, record.name))

    def names_of(self, entity: str) -> list[str]:
        """Project and name of each of an entity's models, the last made first."""
        return [
            f"{record.project}/{record.name}" for record in reversed(self._by_id.values()) if record.entity == entity
        ]

    def by_id(self, model_id: str, *, entity: str) -> ModelRecord:
        """A model of this entity. Raises ApiError, 404."""
        record = self._by_id.get(model_id)
        if record is None or record.entity != entity:
            raise ApiError(404, f"{MODEL_NOT_FOUND}: {model_id!r}", code="model_not_found", param="model_id")
        return record

    def by_name(self, entity: str, project: str, name: str) -> ModelRecord | None:
        """A model by its names."""
        return self._by_name.get((entity, project, name))

    def known(self, model_id: str) -> ModelRecord | None:
        """A model of whichever entity, for the server's own work."""
        return self._by_id.get(model_id)

    def latest(self, record: ModelRecord) -> int:
        """The latest published step of which this server knows."""
        return self._latest.get(record.id, 0)

    def published(self, record: ModelRecord, step: int) -> None:
        """A step is served now."""
        self._latest[record.id] = step

    async def create(
        self, *, entity: str, project: str, name: str, base_model: str, return_existing: bool
    ) -> tuple[ModelRecord, bool]:
        """A new model, or the one that is there, and whether it is new. Raises ApiError, 400 or 409."""
        names = {"entity": entity, "project": project, "name": name}
        try:
            record, new = await self._transactions(
                create_model, **names, base_model=base_model, return_existing=return_existing
            )
        except NameTaken as error:
            raise ApiError(409, str(error), code="name_taken", param="name") from error
        except ValueError as error:
            wrong = next((field for field, value in names.items() if repr(value) in str(error)), None)
            raise ApiError(422, str(error), code="invalid_name", param=wrong) from error
        self._add(record)
        return record, new

    async def delete(self, record: ModelRecord) -> None:
        """Forget a model."""
        self._by_id.pop(record.id, None)
        self._by_name.pop((record.entity, record.project, record.name), None)
        await self._transactions(delete_model, record.id)
        self._latest.pop(record.id, None)

    def _add(self, record: ModelRecord) -> None:
        self._by_id[record.id] = record
        self._by_name[record.entity, record.project, record.name] = record
