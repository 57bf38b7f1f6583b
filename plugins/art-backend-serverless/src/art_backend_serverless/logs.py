"""Which backend sends the trajectories that a model logs, without the hook that hears of them knowing any.

Knows that a registered model can name its backend; sends nothing itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from art_core import TrajectoryGroup
from art_core.errors import NotRegistered

Send: TypeAlias = Callable[[Any, Sequence[TrajectoryGroup], str], Awaitable[None]]
_senders: WeakKeyDictionary[Any, Callable[[], Send | None]] = WeakKeyDictionary()


def sends(backend: Any, send: Callable[[], Send | None]) -> None:
    """What a model logs that is registered with this backend goes through what `send` gives."""
    _senders[backend] = send


def sender_of(model: Any) -> Send | None:
    """Who sends what this model logs; None when nobody does."""
    backend_of = getattr(model, "backend", None)
    if backend_of is None:
        return None
    try:
        found = _senders.get(backend_of())
    except NotRegistered:
        return None
    return None if found is None else found()
