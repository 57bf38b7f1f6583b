"""How a checkpoint becomes what is served: saved → checked → loaded → verified → routed, or failed.

`publish` drives the stages, `ServedSteps` holds what is loaded, routed, leased and in flight for one model. Both know
nothing of HTTP, engines or disks. The route moves only forward and only here; a failed publication leaves the old step
served.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from .cancellation import to_the_end
from .errors import ArtError, CheckpointInUse, CheckpointNotFound, PublicationFailed
from .names import CheckpointRef, ModelKey


class PublicationStage(Enum):
    """Where a publication stands."""

    SAVED = "saved"  #: on disk, whole
    CHECKED = "checked"  #: fits its base model, finite values
    LOADED = "loaded"  #: the engine holds it under its own name
    VERIFIED = "verified"  #: the engine answers under that name, as this checkpoint
    ROUTED = "routed"  #: new requests for the model go to it
    FAILED = "failed"  #: nothing changed for users


_NEXT = {
    PublicationStage.SAVED: PublicationStage.CHECKED,
    PublicationStage.CHECKED: PublicationStage.LOADED,
    PublicationStage.LOADED: PublicationStage.VERIFIED,
    PublicationStage.VERIFIED: PublicationStage.ROUTED,
}


class Publisher(Protocol):
    """What one place of publication can do with a checkpoint; each method raises an ArtError saying why it could
    not.
    """

    async def check(self, checkpoint: CheckpointRef) -> None:
        """Shapes, rank and finite values, before any engine sees it."""

    async def load(self, checkpoint: CheckpointRef) -> None:
        """Have the engine hold it under `checkpoint.adapter_name`."""

    async def verify(self, checkpoint: CheckpointRef) -> None:
        """Have the engine answer the canary under that name."""

    async def route(self, checkpoint: CheckpointRef) -> None:
        """Send new requests for the model to it."""

    async def unload(self, checkpoint: CheckpointRef) -> None:
        """Undo `load`, after a later stage failed."""


@dataclass(frozen=True, kw_only=True)
class PublicationLimits:
    """How long each stage may take, in seconds."""

    check_s: float = 60.0
    load_s: float = 120.0
    verify_s: float = 60.0
    route_s: float = 5.0
    unload_s: float = 60.0


@dataclass(frozen=True, kw_only=True)
class PublicationReceipt:
    """Proof that a step is served: its names, and how many seconds each stage took."""

    model: ModelKey
    step: int
    inference_name: str
    seconds: dict[str, float] = field(default_factory=dict)


class Publication:
    """One checkpoint on its way. Stages follow each other without a gap; FAILED and ROUTED are final."""

    def __init__(self, checkpoint: CheckpointRef) -> None:
        self.checkpoint = checkpoint
        self.stage = PublicationStage.SAVED
        self.seconds: dict[str, float] = {}

    def advance(self, to: PublicationStage, seconds: float = 0.0) -> None:
        """Move to the next stage. Raises ValueError for any other."""
        if to is not _NEXT.get(self.stage):
            raise ValueError(f"a publication cannot go from {self.stage.value} to {to.value}")
        self.stage = to
        self.seconds[to.value] = seconds

    def fail(self) -> None:
        """End the publication. Raises ValueError when it is over already."""
        if self.stage not in _NEXT:
            raise ValueError(f"a publication that is {self.stage.value} cannot fail")
        self.stage = PublicationStage.FAILED

    @property
    def may_be_loaded(self) -> bool:
        """True once `load` may have reached the engine, so that a failure has to unload it."""
        return self.stage in (PublicationStage.CHECKED, PublicationStage.LOADED, PublicationStage.VERIFIED)


async def publish(
    checkpoint: CheckpointRef, publisher: Publisher, limits: PublicationLimits | None = None
) -> PublicationReceipt:
    """Take a saved checkpoint through every stage.

    Raises PublicationFailed naming the stage, the cause and the step that stays served; the adapter is unloaded first.
    Cancelling unloads it too.
    """
    limits = limits or PublicationLimits()
    publication = Publication(checkpoint)
    stages = (
        (PublicationStage.CHECKED, "check", publisher.check, limits.check_s),
        (PublicationStage.LOADED, "load", publisher.load, limits.load_s),
        (PublicationStage.VERIFIED, "verify", publisher.verify, limits.verify_s),
        (PublicationStage.ROUTED, "route", publisher.route, limits.route_s),
    )
    for reached, verb, work, limit_s in stages:
        start = time.perf_counter()
        try:
            await _within(limit_s, work(checkpoint))
        except BaseException as error:
            unload_problem = await _undo(publication, publisher, limits.unload_s)
            publication.fail()
            if not isinstance(error, Exception):
                raise
            raise PublicationFailed(
                f"{checkpoint.inference_name} was not published: to {verb} it failed, because {_reason(error)}."
                f" The step served before is still served.{unload_problem}",
                stage=verb,
            ) from error
        publication.advance(reached, time.perf_counter() - start)
    return PublicationReceipt(
        model=checkpoint.model,
        step=checkpoint.step,
        inference_name=checkpoint.inference_name,
        seconds=publication.seconds,
    )


async def _within(limit_s: float, work: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(limit_s) as limit:
            await work
    except TimeoutError as error:
        # A publisher may have limits of its own; only ours is ours to name.
        if not limit.expired():
            raise
        raise TimeoutError(f"it took longer than {limit_s:g} s") from error


def _reason(error: BaseException) -> str:
    known = isinstance(error, ArtError | TimeoutError | OSError) and str(error)
    return (str(error) if known else f"{type(error).__name__}: {error}").rstrip(". ")


async def _undo(publication: Publication, publisher: Publisher, limit_s: float) -> str:
    if not publication.may_be_loaded:
        return ""
    try:
        await to_the_end(_within(limit_s, publisher.unload(publication.checkpoint)))
    except Exception as error:
        return f" Unloading it failed too ({_reason(error)})."
    return ""


class ServedSteps:
    """What is served of one model: loaded steps, the routed one, requests in flight and leases.

    Plain state without I/O, for one event loop. A step that is routed, in flight or leased is never given up for
    unloading.
    """

    def __init__(self, key: ModelKey) -> None:
        self.key = key
        self._loaded: set[int] = set()
        self._routed: int | None = None
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

    def route(self, step: int) -> None:
        """Send the plain name to `step`. Raises ValueError unless it is loaded and not older than the routed one."""
        if step not in self._loaded:
            raise ValueError(f"{self.key}@{step} is not loaded, so nothing can be routed to it")
        if self._routed is not None and step < self._routed:
            raise ValueError(f"the route of {self.key} moves only forward: from {self._routed} it cannot go to {step}")
        self._routed = step

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

    def lose_all(self) -> set[int]:
        """The engine died: nothing is loaded. Gives the steps to load again: the routed and the leased ones."""
        self._loaded.clear()
        # From the route and the leases, not from what was loaded: it may die again before all of it is back.
        return set(self._leases) | (set() if self._routed is None else {self._routed})


def _count_down(counter: Counter[int], step: int) -> None:
    if counter[step] <= 0:
        raise ValueError(f"step {step} was released more often than it was acquired")
    counter[step] -= 1
    if not counter[step]:
        del counter[step]
