"""How a checkpoint becomes what is served: saved → checked → loaded → verified → routed, or failed.

`publish` drives the stages. It knows nothing of HTTP, engines or disks. The route moves only here; a failed publication
leaves the old step served.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from .cancellation import to_the_end
from .errors import ArtError, PublicationFailed
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
                f" What was served before still is.{unload_problem}",
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
