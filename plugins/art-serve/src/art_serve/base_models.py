"""Which base models clients may name, and what the backend is told for them.

A backend takes folders of this machine too, and a client may neither read these nor learn which there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from art_gateway.errors import ApiError

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?", re.ASCII)


class BaseModels:
    """The names that are taken: those given, or without any each that looks like one of a model hub."""

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        self._given = dict(given or {})

    @classmethod
    def of(cls, options: Sequence[str]) -> Self:
        """From `NAME` or `NAME=FOLDER`, once for each."""
        given: dict[str, str] = {}
        for option in options:
            name, equals, where = option.partition("=")
            if not name or (equals and not where):
                raise ValueError(f"--base-model={option!r}: give a name, or NAME=FOLDER")
            given[name] = str(Path(where).expanduser().resolve()) if equals else name
        return cls(given)

    @property
    def schema(self) -> dict[str, Any]:
        """What the OpenAPI page says of a base model's name."""
        return {"enum": sorted(self._given)} if self._given else {"pattern": f"^{_HUB_NAME.pattern}$"}

    def check(self, name: str) -> None:
        """Raise ApiError, 422, for a name that isn't taken."""
        if self._given:
            if name not in self._given:
                raise _refused(name, f"this server trains {', '.join(sorted(self._given))}")
        elif not _HUB_NAME.fullmatch(name) or Path(name).exists():
            raise _refused(name, "give the name of a model on the hub, such as 'Qwen/Qwen2.5-0.5B-Instruct'")

    def resolve(self, name: str) -> str:
        """What the backend is told."""
        return self._given.get(name, name)


def _refused(name: str, instead: str) -> ApiError:
    message = f"base_model={name[:200]!r} is not served here: {instead}."
    return ApiError(422, message, code="base_model_not_served", param="base_model")
