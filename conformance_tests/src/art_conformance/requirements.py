"""A check is a test with a stable id, a level and one sentence of requirement; this module ties the three together.

It knows nothing of pytest's run, of ART or of what is checked. An id is never given to another requirement.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from art_core import Capability

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
_ID = re.compile(r"[A-Z]{3}-\d{3}")
_ATTRIBUTE = "__conformance__"


class Level(Enum):
    """How binding a requirement is."""

    MUST = "MUST"  #: not meeting it fails the run
    SHOULD = "SHOULD"  #: not meeting it is reported and fails nothing


MUST, SHOULD = Level.MUST, Level.SHOULD


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """One requirement. `needs` is the capability whose declaration makes it apply; `live` says that checking it starts
    real processes.
    """

    id: str
    level: Level
    text: str
    needs: Capability | None = None
    live: bool = False

    def as_json(self) -> dict[str, Any]:
        """The object in listings and in the frozen sets."""
        return {
            "id": self.id,
            "level": self.level.value,
            "needs": None if self.needs is None else str(self.needs.value),
            "requirement": self.text,
        }


def check(
    id: str, level: Level, text: str, *, needs: Capability | None = None, live: bool = False
) -> Callable[[FunctionT], FunctionT]:
    """Make a test method the check of a requirement.

    Raises ValueError for an id that isn't like "PUB-003" and for a text that isn't one sentence.
    """
    if not _ID.fullmatch(id):
        raise ValueError(f"{id!r} is not an id: three capitals, a dash, three digits, as in 'PUB-003'")
    if not text.endswith(".") or "\n" in text:
        raise ValueError(f"the requirement of {id} must be one sentence on one line that ends with a full stop")

    def mark(function: FunctionT) -> FunctionT:
        setattr(function, _ATTRIBUTE, Requirement(id=id, level=level, text=text, needs=needs, live=live))
        marked: Any = function
        if inspect.iscoroutinefunction(function):
            marked = pytest.mark.asyncio(loop_scope="class")(marked)
        if live:
            marked = pytest.mark.slow(marked)
        return marked  # type: ignore[no-any-return]

    return mark


def requirement_of(function: object) -> Requirement | None:
    """The requirement that a function checks, or None."""
    found = getattr(function, _ATTRIBUTE, None)
    return found if isinstance(found, Requirement) else None


def checks_of(suite: type) -> Iterator[tuple[str, Callable[..., Any], Requirement]]:
    """Every check of a suite with its method's name, by id.

    Raises ValueError when two checks have one id, or one method name, so that one would hide the other.
    """
    by_id: dict[str, tuple[str, Callable[..., Any], Requirement]] = {}
    ids: dict[str, str] = {}
    for base in suite.__mro__:
        for name, function in vars(base).items():
            requirement = requirement_of(function)
            if requirement is None:
                continue
            if ids.setdefault(name, requirement.id) != requirement.id:
                raise ValueError(f"{name} is the check of both {ids[name]} and {requirement.id}")
            known = by_id.setdefault(requirement.id, (name, function, requirement))
            if known[0] != name:
                raise ValueError(f"{requirement.id} is the id of both {known[0]} and {name}")
    yield from (by_id[id] for id in sorted(by_id))


def suite_of(cls: type) -> type | None:
    """The suite that a test class inherits from: its nearest base that this package defines, itself excluded."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] == __package__ and base.__name__.endswith("Conformance"):
            return base
    return None
