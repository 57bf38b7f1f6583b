"""How often each entity may ask: a bucket that fills at a rate, and from which each request takes one."""

from __future__ import annotations

import time
from collections.abc import Callable


class RequestRate:
    """`per_s` requests a second and entity in the long run, and `burst` at once."""

    def __init__(self, *, per_s: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_s = per_s
        self._burst = burst
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, entity: str) -> float:
        """Count a request: 0 when it may pass, else how long to wait, in seconds."""
        now = self._clock()
        left, since = self._left.get(entity, (self._burst, now))
        left = min(self._burst, left + (now - since) * self.per_s)
        if left < 1:
            self._left[entity] = (left, now)
            return (1 - left) / self.per_s
        self._left[entity] = (left - 1, now)
        return 0.0
