"""What is served of one model, as plain state: which steps are loaded, routed, leased and in flight.

The route moves only forward, and a step that somebody uses is never given up. Knows nothing of HTTP, engines or disks.
"""

from __future__ import annotations

from collections import Counter

from art_core import ModelKey
from art_core.errors import CheckpointInUse, CheckpointNotFound


class ServedSteps:
    """What is served of one model: loaded steps, the routed one, requests in flight and leases.

    Plain state without I/O, for one event loop. A step that is routed, in flight or leased is never given up for
    unloading. One that is only routed may be rested: unloaded until somebody asks for it.
    """

    def __init__(self, key: ModelKey) -> None:
        self.key = key
        self._loaded: set[int] = set()
        self._routed: int | None = None
        self._resting = False
        self._in_flight: Counter[int] = Counter()
        self._leases: Counter[int] = Counter()

    @property
    def routed(self) -> int | None:
        """The step that answers to the model's plain name; None before the first publication."""
        return self._routed

    @property
    def loaded(self) -> frozenset[int]:
        """The steps that the engine holds."""
        return frozenset(self._loaded)

    def add(self, step: int) -> None:
        """The engine holds `step` now, verified. It can be asked for by its own name; the route has not moved."""
        self._loaded.add(step)
        self._resting = self._resting and step != self._routed

    def route(self, step: int) -> None:
        """Send the plain name to `step`. Raises ValueError unless it is loaded and not older than the routed one."""
        if step not in self._loaded:
            raise ValueError(f"{self.key}@{step} is not loaded, so nothing can be routed to it")
        if self._routed is not None and step < self._routed:
            raise ValueError(f"the route of {self.key} moves only forward: from {self._routed} it cannot go to {step}")
        self._routed, self._resting = step, False

    def acquire(self, step: int | None = None) -> int:
        """Count a request in flight to `step` (None: the routed one) and give the step it is pinned to.

        Raises CheckpointNotFound when that step is not loaded.
        """
        pinned = self._routed if step is None else step
        if pinned is None or pinned not in self._loaded:
            there = ", ".join(map(str, sorted(self._loaded))) or "none"
            raise CheckpointNotFound(
                f"{self.key}{'' if step is None else f'@{step}'} is not served; served steps: {there}."
            )
        self._in_flight[pinned] += 1
        return pinned

    def release(self, step: int) -> None:
        """The request ended."""
        _count_down(self._in_flight, step)

    def lease(self, step: int) -> None:
        """Keep `step` until `end_lease`. Raises CheckpointNotFound when it is not loaded."""
        if step not in self._loaded:
            raise CheckpointNotFound(f"{self.key}@{step} is not served, so it cannot be leased.")
        self._leases[step] += 1

    def end_lease(self, step: int) -> None:
        """Let a leased step go."""
        _count_down(self._leases, step)

    @property
    def leased(self) -> bool:
        """True while a step is leased."""
        return bool(self._leases)

    def in_flight(self, step: int) -> int:
        """How many requests are under way on `step`."""
        return self._in_flight[step]

    def in_use(self, step: int) -> bool:
        """True while `step` is routed, in flight or leased."""
        return step == self._routed or self._in_flight[step] > 0 or self._leases[step] > 0

    def idle(self, *, keep: int = 0) -> list[int]:
        """Loaded steps that nobody uses, oldest first, leaving out the newest `keep` of them."""
        unused = sorted(step for step in self._loaded if not self.in_use(step))
        return unused[: max(0, len(unused) - keep)]

    def remove(self, step: int) -> None:
        """Forget a loaded step before it is unloaded. Raises CheckpointInUse while it is in use."""
        if self.in_use(step):
            raise CheckpointInUse(f"{self.key}@{step} is routed, leased or has requests in flight, so it stays.")
        self._loaded.discard(step)

    @property
    def can_rest(self) -> bool:
        """True when the routed step is loaded, and neither leased nor in flight."""
        routed = self._routed
        return routed in self._loaded and not self._in_flight[routed or 0] and not self._leases[routed or 0]

    def rest(self) -> int:
        """Forget the routed step before it is unloaded; the route stays. Raises CheckpointInUse while it is asked."""
        if self._routed is None or not self.can_rest:
            raise CheckpointInUse(f"{self.key}@{self._routed} is not loaded, leased, or has requests in flight.")
        self._loaded.discard(self._routed)
        self._resting = True
        return self._routed

    def lose_all(self) -> set[int]:
        """The engine died: nothing is loaded. Gives the steps to load again: the leased ones, and the routed one unless
        it rests.
        """
        self._loaded.clear()
        # From the route and the leases, not from what was loaded: it may die again before all of it is back.
        return set(self._leases) | (set() if self._routed is None or self._resting else {self._routed})


def _count_down(counter: Counter[int], step: int) -> None:
    if counter[step] <= 0:
        raise ValueError(f"step {step} was released more often than it was acquired")
    counter[step] -= 1
    if not counter[step]:
        del counter[step]
