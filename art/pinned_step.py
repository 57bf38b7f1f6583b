"""Which step the requests of a rollout go to, where somebody holds one for it.

A context variable, so that thousands of rollouts in one process each see their own. Knows addresses and names; holds no
lease itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

_PINNED: ContextVar[Mapping[tuple[str, str], str] | None] = ContextVar("art_pinned_step", default=None)


@contextmanager
def pinned(base_url: str, name: str, to: str) -> Iterator[None]:
    """In the block and in the tasks it starts, who asks at `base_url` for `name` asks for `to`."""
    before = _PINNED.get() or {}
    token = _PINNED.set({**before, (base_url.rstrip("/"), name): to})
    try:
        yield
    finally:
        _PINNED.reset(token)


def pinned_name(base_url: str, name: str) -> str | None:
    """What `name` is pinned to here; None when it isn't."""
    held = _PINNED.get()
    return held.get((base_url.rstrip("/"), name)) if held else None
