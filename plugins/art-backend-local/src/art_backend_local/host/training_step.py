"""One training step in the host: from a groups file to a whole checkpoint, with inference stepping aside if it must.

Publishing is a call of its own, since the client's plugins may refuse between the two. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

from art_core import TrainingCapability, require
from art_core.errors import CheckpointNotFound, PublicationFailed, TrainingFailed
from art_engine_kit.adapter_files import check_adapter
from art_engine_kit.training_wire import AdapterWritten, JobEnded, KlReference, TrainJob
from art_runtime import StartProgress

from ..servers.training_worker import TrainingWorker
from ..wire.deployment import works_at_once
from ..wire.messages import (
    BeginRequest,
    OwnStep,
    PublishRequest,
    PutAsideRequest,
    ReleaseRequest,
    TrainRequest,
)
from .device_turns import inference_aside
from .host import Host
from .hosted_model import HostedModel
from .processes import status_event
from .sessions import Session
from .training_hold import TrainingHold

JSON = dict[str, Any]
Emit = Callable[[JSON], None]


async def begin_step(model: HostedModel, session: Session, request: BeginRequest) -> JSON:
    """Hold the model for a step of this client; gives its number and the steps that there are. A step that was saved
    and never published comes first: `pending`, which the client publishes under the hold, and then begins again.

    Raises ModelBusy while another step of the model is under way.
    """
    hold = await model.turn.take(request.hold, session)
    pending = await model.pending()
    if pending is None:
        hold.step = await model.next_step()
    return {"step": hold.step, "pending": pending, "steps": list(model.known)}


async def train_step(host: Host, request: TrainRequest, emit: Emit) -> JSON:
    """Train and save the step that was begun; gives its number, folder and metrics.

    What a step that fails or is cancelled may have saved at the last moment goes when its client says so; of a client
    that died it is kept, for the next one to publish.
    """
    model = host.model(request.key)
    hold = model.turn.of(request.hold)
    worker = host.processes.worker_for(model.deployment)
    step = hold.step
    assert step is not None, "a step is begun before it is trained"
    hold.owns(_this_task())
    try:
        return await _train(host, model, worker, step, request, emit)
    finally:
        hold.owns(asyncio.create_task(_until_settled(worker, model, hold), name=f"{model.key}@{step} is trained"))


async def publish_step(model: HostedModel, request: PublishRequest) -> JSON:
    """Publish a saved step; gives the seconds of each stage and the steps that went because they were not kept.

    A checkpoint that is itself at fault is put aside, so that the next step starts from the one that is served.
    """
    hold = model.turn.of(request.hold)
    hold.owns(_this_task())
    # From here on a client that dies leaves it to the next one to publish.
    hold.saved = False
    if not request.keep:
        model.folder.not_kept(request.step).touch()
    try:
        receipt = await model.publish(model.ref(request.step))
    except PublicationFailed as error:
        if error.stage in ("check", "verify") and model.server.up:
            error.put_aside = await model.put_aside(request.step)
            error.args = (f"{error} The checkpoint is kept as {error.put_aside}.",)
        raise
    removed = await model.remove_not_kept()
    return {"seconds": receipt.seconds, "removed": removed}


async def put_step_aside(model: HostedModel, request: PutAsideRequest) -> JSON:
    """Keep a saved step out of the way; gives where, None when it is served after all."""
    hold = model.turn.of(request.hold)
    hold.saved = False
    aside = await model.put_aside(request.step)
    return {"path": None if aside is None else str(aside)}


async def release_step(model: HostedModel, request: ReleaseRequest, session: Session) -> JSON:
    """Let the hold go; one that never came is refused when it comes."""
    if request.discard:
        await model.turn.discard(request.hold, model.discard)
    model.turn.release(request.hold)
    session.let_go(request.hold)
    return {}


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None, "requests are answered in tasks"
    return task


async def _until_settled(worker: TrainingWorker, model: HostedModel, hold: TrainingHold) -> None:
    """A job that was cancelled may have been saving just then."""
    await worker.settled()
    assert hold.step is not None, "it was trained"
    hold.saved = model.ref(hold.step).path.exists()
    if not hold.saved:
        await model.forget_early()
    if hold.discarded and hold.saved:
        await model.discard(hold.step)


async def _train(
    host: Host, model: HostedModel, worker: TrainingWorker, step: int, request: TrainRequest, emit: Emit
) -> JSON:
    settings = model.deployment.settings
    if request.reference is not None:
        require(
            TrainingCapability.KL_REFERENCE,
            worker.engine.capabilities,
            plugin=worker.engine.name,
            instead="Leave kl_penalty_coef at 0, or use a training engine that declares it.",
        )

    if request.supervised is not None:
        require(
            TrainingCapability.SFT,
            worker.engine.capabilities,
            plugin=worker.engine.name,
            instead='Use a training engine that declares it, such as training_engine="torch".',
        )

    async with AsyncExitStack() as stack:
        if worker.turn.locked():
            other = f"the training worker {worker.engine.name}, which trains another model"
            emit(status_event(StartProgress(name=other, seconds=0, last_line="")))
        await stack.enter_async_context(worker.turn)
        await worker.settled()
        start = await model.latest()
        reference = await _reference(model, request)
        stack.enter_context(model.used_for_training({start.step, *_step_of(request)}))
        server = model.server
        at_once = works_at_once(
            settings, server.engine.capabilities, has_gpu=host.processes.has_gpu, attached=server.attached
        )
        job = TrainJob(
            model=str(model.key),
            step=step,
            start=start.path,
            destination=model.ref(step).path,
            groups_file=request.groups_file,
            reference=reference,
            supervised=request.supervised,
            tell_written=at_once,
            options=request.options,
            adapter=settings.adapter,
        )
        if not at_once:
            await stack.enter_async_context(inference_aside(server, report=host.report))
        await worker.ensure_running(lambda progress: emit(status_event(progress)))
        emit({"event": "job", "step": step, "start": start.step})
        metrics: dict[str, float] = {}
        async with aclosing(worker.run(job)) as events:
            async for event in events:
                if isinstance(event, AdapterWritten):
                    model.load_early(step, event)
                    continue
                emit(event.model_dump(mode="json"))
                if isinstance(event, JobEnded):
                    metrics = event.metrics
    if step not in await model.on_disk():
        raise TrainingFailed(
            f"the training worker {worker.engine.name} said that step {step} of {model.key} had ended and left no whole"
            f" checkpoint in {job.destination}, which is a fault of that engine. The step before is still served."
        )
    return {"step": step, "path": str(job.destination), "metrics": metrics}


async def _reference(model: HostedModel, request: TrainRequest) -> KlReference | None:
    """The reference with its folder."""
    given = request.reference
    if isinstance(given, OwnStep):
        there = await model.on_disk()
        if given.step not in there:
            raise CheckpointNotFound(
                f"kl_penalty_reference_step={given.step}: {model.key} has no whole checkpoint of that step; there:"
                f" {', '.join(map(str, there)) or 'none'}."
            )
        return KlReference(adapter=there[given.step])
    if given is not None and given.adapter is not None:
        await asyncio.to_thread(check_adapter, given.adapter, model.base_shapes)
    return given


def _step_of(request: TrainRequest) -> set[int]:
    return {request.reference.step} if isinstance(request.reference, OwnStep) else set()
