"""One training step in the host: from a groups file to a whole checkpoint, with inference stepping aside if it must.

Publishing is a call of its own, since the client's plugins may refuse between the two. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

from art_core import CheckpointRef, TrainingCapability, require
from art_core.errors import CheckpointNotFound, ModelBusy
from art_engine_kit.adapter_files import check_adapter
from art_engine_kit.checkpoint_folder import MANIFEST, saving
from art_engine_kit.training_wire import JobEnded, JobSaved, TrainJob
from art_runtime import StartProgress

from ..wire.messages import PublishRequest, TrainRequest
from ..wire.settings import works_at_once
from .device_turns import inference_aside
from .host_state import HostState, status_event
from .hosted_model import HostedModel, mark_not_kept
from .sessions import Session

JSON = dict[str, Any]
Emit = Callable[[JSON], None]


async def train_step(state: HostState, session: Session, request: TrainRequest, emit: Emit) -> JSON:
    """Train and save one step; gives its number, folder and metrics. The model stays this session's until it publishes,
    refuses, or is gone.

    Raises ModelBusy while another step of the model is under way.
    """
    model = state.model(request.key)
    hold = _take(model, session)
    try:
        result = await _train(state, model, request, emit)
    except BaseException:
        session.let_go(hold)
        raise
    return {**result, "hold": hold}


async def publish_step(model: HostedModel, request: PublishRequest) -> JSON:
    """Publish a saved step; gives the seconds of each stage and the steps that went because they were not kept.

    A checkpoint that is itself at fault is put aside, so that the next step starts from the one that is served.
    """
    if not request.keep:
        mark_not_kept(model.ref(request.step).path)
    receipt = await model.publish(model.ref(request.step))
    removed = await model.remove_not_kept()
    return {"seconds": receipt.seconds, "removed": removed}


def _take(model: HostedModel, session: Session) -> str:
    if model.trained_by is not None:
        who = "this client" if model.trained_by == session.id else "another client"
        raise ModelBusy(
            f"{model.key} is being trained by {who}. One step at a time: two writers of one adapter would overwrite"
            " each other. Wait for that step, or use another model name."
        )
    model.trained_by = session.id

    def let_go() -> None:
        model.trained_by = None

    return session.hold(let_go)


async def _train(state: HostState, model: HostedModel, request: TrainRequest, emit: Emit) -> JSON:
    registration = state.requests[request.key]
    worker = state.worker_for(registration)
    options = request.options
    if options.kl_penalty_coef > 0 or request.reference is not None or options.kl_penalty_reference_step is not None:
        require(
            TrainingCapability.KL_REFERENCE,
            worker.engine.capabilities,
            plugin=worker.engine.name,
            instead="Leave kl_penalty_coef at 0, or use a training engine that declares it.",
        )

    async with AsyncExitStack() as stack:
        if worker.turn.locked():
            other = f"the training worker {worker.engine.name}, which trains another model"
            emit(status_event(StartProgress(name=other, seconds=0, last_line="")))
        await stack.enter_async_context(worker.turn)
        await worker.settled()
        # A step that an earlier client saved but did not live to publish comes first.
        await model.publish_latest()
        start = await model.latest()
        step = await model.next_step()
        reference = await _reference(model, request)
        stack.enter_context(model.used_for_training({start.step, *_step_of(request)}))
        job = TrainJob(
            model=str(model.key),
            step=step,
            start=start.path,
            destination=model.ref(step).path,
            groups_file=request.groups_file,
            reference=reference,
            options=options,
            adapter=registration.settings.adapter,
        )
        server = model.server
        if not works_at_once(
            registration.settings, server.engine.capabilities, has_gpu=state.has_gpu, attached=server.attached
        ):
            await stack.enter_async_context(
                inference_aside(server, in_flight=lambda: state.in_flight(server), report=state.report)
            )
        await worker.ensure_running(lambda progress: emit(status_event(progress)))
        emit({"event": "job", "step": step, "start": start.step})
        metrics: dict[str, float] = {}
        saved = False
        async with aclosing(worker.run(job)) as events:
            async for event in events:
                emit(event.model_dump(mode="json"))
                saved = saved or isinstance(event, JobSaved)
                if isinstance(event, JobEnded):
                    metrics = event.metrics
        if not saved:
            await asyncio.to_thread(_carry, start, job, metrics)
    await model.on_disk()
    return {"step": step, "path": str(job.destination), "metrics": metrics}


async def _reference(model: HostedModel, request: TrainRequest) -> Path | None:
    if request.options.kl_penalty_reference_step is not None:
        step = request.options.kl_penalty_reference_step
        there = await model.on_disk()
        if step not in there:
            raise CheckpointNotFound(
                f"kl_penalty_reference_step={step}: {model.key} has no whole checkpoint of that step; there:"
                f" {', '.join(map(str, there)) or 'none'}."
            )
        return there[step]
    if request.reference is not None:
        await asyncio.to_thread(check_adapter, request.reference, model.base_shapes)
    return request.reference


def _step_of(request: TrainRequest) -> set[int]:
    step = request.options.kl_penalty_reference_step
    return set() if step is None else {step}


def _carry(start: CheckpointRef, job: TrainJob, metrics: dict[str, float]) -> None:
    """The engine had nothing to train on and saved nothing: the start checkpoint becomes the new step as it is."""
    with saving(job.destination, step=job.step, base_model="", engine="local", metrics=metrics) as folder:
        for file in start.path.iterdir():
            if file.is_file() and file.name != MANIFEST:
                shutil.copyfile(file, folder / file.name)
