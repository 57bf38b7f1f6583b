"""The order of a training step: what is asked, done and told, each exactly once, whatever is refused, fails or is
cancelled.

before_train → train → saved → before_publish → publish → published or publish_failed → let go → after_train or
train_failed. A backend gives the verbs. Knows hooks; does no I/O, and knows neither engines nor files.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from .announcements import announce, ask_permission
from .backend import Backend, PolicyModel
from .cancellation import to_the_end
from .errors import PublicationFailed
from .names import CheckpointRef
from .publication import PublicationReceipt
from .registry import PluginRegistry
from .results import TrainResult
from .trajectories import TrajectoryGroup

ResultT = TypeVar("ResultT", bound=TrainResult)
ResultT_co = TypeVar("ResultT_co", bound=TrainResult, covariant=True)


class PublishVerbs(Protocol):
    """What a backend does with a checkpoint that is saved; each has a limit of its own."""

    async def publish(self, checkpoint: CheckpointRef) -> PublicationReceipt:
        """Serve it, verified. Raises PublicationFailed, whose `put_aside` says where a checkpoint at fault is kept."""

    async def put_aside(self, checkpoint: CheckpointRef) -> CheckpointRef | PublicationReceipt:
        """Keep it out of the way: a plugin vetoed it, or the step was cancelled. Gives where it is now, or the receipt
        when it is served after all.
        """

    async def let_go(self) -> None:
        """Let others train the model; whatever this step held, it holds no longer."""


@dataclass(frozen=True)
class SavedStep(Generic[ResultT_co]):
    """A step that is trained, and whole on disk or wherever the backend keeps checkpoints."""

    checkpoint: CheckpointRef
    result: ResultT_co


class StepVerbs(PublishVerbs, Protocol[ResultT_co]):
    """What a backend does in a training step."""

    async def train_and_save(self) -> SavedStep[ResultT_co]:
        """Train and save. When it raises, cancelled or not, nothing of the step is kept."""


async def run_step(
    registry: PluginRegistry,
    backend: Backend,
    model: PolicyModel,
    trajectory_groups: Sequence[TrajectoryGroup],
    verbs: StepVerbs[ResultT],
    *,
    step: int,
) -> ResultT:
    """Train `step` and publish it; gives the backend's result, with `time/step_publish_s` among its metrics.

    Raises what a plugin refused with, and what a verb raised; the step before is served then. A cancellation that comes
    once the step is served is raised after all have been told that it worked.
    """
    told: dict[str, Any] = {"backend": backend, "model": model}
    try:
        await ask_permission(registry, "art_before_train", **told, step=step, trajectory_groups=trajectory_groups)
        saved = await verbs.train_and_save()
        start = time.perf_counter()
        receipt, late = await _publish(registry, model, saved.checkpoint, verbs, just_saved=True)
    except BaseException as error:
        failed = announce(registry, "art_train_failed", **told, step=step, error=error)
        await _each(to_the_end(verbs.let_go()), failed)
        raise
    metrics = {**saved.result.metrics, "time/step_publish_s": time.perf_counter() - start}
    result = replace(saved.result, metrics=metrics)
    await _each(
        announce(registry, "art_checkpoint_published", model=model, checkpoint=saved.checkpoint, receipt=receipt),
        to_the_end(verbs.let_go()),
        announce(registry, "art_after_train", **told, result=result),
    )
    if late is not None:
        raise late
    return result


async def publish_saved(
    registry: PluginRegistry, model: PolicyModel, checkpoint: CheckpointRef, verbs: PublishVerbs
) -> PublicationReceipt:
    """Publish a checkpoint whose step is over, such as one that an earlier client didn't live to publish, or a fork.

    Raises as `run_step` does.
    """
    try:
        receipt, late = await _publish(registry, model, checkpoint, verbs, just_saved=False)
    except BaseException:
        await to_the_end(verbs.let_go())
        raise
    published = announce(registry, "art_checkpoint_published", model=model, checkpoint=checkpoint, receipt=receipt)
    await _each(published, to_the_end(verbs.let_go()))
    if late is not None:
        raise late
    return receipt


async def _publish(
    registry: PluginRegistry, model: PolicyModel, checkpoint: CheckpointRef, verbs: PublishVerbs, *, just_saved: bool
) -> tuple[PublicationReceipt, BaseException | None]:
    """The receipt, and the cancellation that came too late to keep it from being served."""
    told: dict[str, Any] = {"model": model, "checkpoint": checkpoint}
    publishing = False
    try:
        if just_saved:
            await announce(registry, "art_checkpoint_saved", **told)
        await ask_permission(registry, "art_before_publish_checkpoint", **told)
        publishing = True
        return await verbs.publish(checkpoint), None
    except BaseException as error:
        if publishing and isinstance(error, Exception):
            # Whoever publishes knows whether the checkpoint is at fault, or may be published later.
            aside = error.put_aside if isinstance(error, PublicationFailed) else None
            now = checkpoint if aside is None else replace(checkpoint, path=aside)
        else:
            kept: CheckpointRef | PublicationReceipt = checkpoint

            async def put_aside() -> None:
                nonlocal kept
                kept = await verbs.put_aside(checkpoint)

            try:
                await to_the_end(put_aside())
            except asyncio.CancelledError as again:
                error = again
            except Exception as problem:
                error.add_note(f"{checkpoint.path} could not be put aside: {problem}")
            if isinstance(kept, PublicationReceipt):
                return kept, error
            now = kept
        await announce(registry, "art_checkpoint_publish_failed", model=model, checkpoint=now, error=error)
        raise error


async def _each(*work: Coroutine[Any, Any, None]) -> None:
    """Do one after the other, all of them, and raise what the first that failed raised."""
    first: BaseException | None = None
    for each in work:
        try:
            await each
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first
