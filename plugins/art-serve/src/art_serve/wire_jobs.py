"""The wire's addresses of training jobs: submit one, see how far it is, and read its events. Runs nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request

from art_backend_serverless import wire
from art_core import BackendCapability
from art_gateway.errors import ApiError

from .answers import ERRORS, body_of, idempotency_key, key_reused, leading_to, new_key, number_of
from .job_events import events_after
from .job_payload import JobPayload, read_conversations, read_groups, sft_options
from .job_queue import Job, JobState, QueueFull, find_job, place_of, submit
from .model_records import ModelRecord
from .request_bodies import message_of, read_message
from .service import Service
from .wire_models import needs

_RETRY_S = 15.0
_JOB_ID_LENGTH = 32


def jobs_router(service: Service) -> APIRouter:
    """The addresses."""
    router = APIRouter(responses=ERRORS)
    catalogue, limits, news = service.catalogue, service.limits, service.news

    async def enqueue(record: ModelRecord, key: str, payload: JobPayload) -> wire.Job:
        try:
            job = await service.transactions(
                submit,
                entity=record.entity,
                model_id=record.id,
                idempotency_key=key,
                payload=payload.model_dump_json(),
                most_waiting=limits.waiting_jobs,
            )
        except QueueFull as error:
            await forget(payload)
            raise ApiError(429, str(error), code="queue_full", retry_after_s=_RETRY_S) from error
        except ValueError as error:
            await forget(payload)
            raise key_reused(error) from error
        if job.state in (JobState.SUCCEEDED, JobState.FAILED):
            await forget(payload)
        news.told(job.id)
        service.worker.wake()
        return wire.Job(id=job.id)

    async def forget(payload: JobPayload) -> None:
        if payload.file is not None:
            await asyncio.to_thread(service.files.forget_job, payload.file)

    leads = leading_to("get_training_job", "list_events", job_id="id")

    @router.post(wire.TRAINING_JOBS, responses=leads, **body_of(wire.CreateTrainingJob))
    async def create_training_job(request: Request) -> wire.Job:
        """Queue a step of reinforcement learning."""
        key = idempotency_key(request) or new_key()
        async with service.bodies.arriving(request, limit=limits.bodies.job) as arrived:
            own = partial(catalogue.by_id, entity=request.state.entity)
            record, count = await service.bodies.read(_read_job, arrived.file, own)
            file = await asyncio.to_thread(service.files.keep_job, arrived, record.id, key)
        return await enqueue(record, key, JobPayload(file=file, num_sequences=count))

    @router.post(wire.SFT_TRAINING_JOBS, **body_of(wire.CreateSftTrainingJob))
    async def create_sft_training_job(request: Request) -> wire.Job:
        """Queue a step on the replies of conversations that were uploaded."""
        key = idempotency_key(request) or new_key()
        asked = await read_message(request, wire.CreateSftTrainingJob, limits=limits.bodies)
        record = catalogue.by_id(asked.model_id, entity=request.state.entity)
        needs(BackendCapability.SFT, service)
        file = await asyncio.to_thread(service.files.upload, record.entity, asked.training_data_url)
        if file is None:
            message = f"There is nothing at {asked.training_data_url[:300]!r}; POST {wire.UPLOADS} gives an address."
            raise ApiError(422, message, code="upload_not_found", param="training_data_url")
        count = len(await service.bodies.read(read_conversations, file))
        options = sft_options(asked.config)
        payload = JobPayload(url=asked.training_data_url, num_sequences=count, options=options)
        return await enqueue(record, key, payload)

    upload_body = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

    @router.post(wire.UPLOADS, openapi_extra={"requestBody": {"required": True, "content": upload_body}})
    async def upload(request: Request) -> wire.Upload:
        """Keep a file to train on, a JSON object with `messages` a line. It stays for a week."""
        idempotency_key(request)
        needs(BackendCapability.SFT, service)
        entity: str = request.state.entity
        async with service.bodies.arriving(request, limit=limits.bodies.upload) as arrived:
            url = await asyncio.to_thread(service.files.keep_upload, arrived, entity)
        return wire.Upload(url=url, sha256=arrived.sha256, size=arrived.size)

    @router.get(wire.TRAINING_JOB)
    async def get_training_job(request: Request, job_id: str) -> wire.JobStatus:
        """Where a job is."""
        job = await _own(service, request, job_id)
        running = service.worker.running
        phase = service.worker.phase if running is not None and running.id == job.id else None
        return wire.JobStatus.model_validate(
            {
                "id": job.id,
                "state": job.state.value,
                "phase": phase,
                "place": await service.transactions(place_of, job),
                "step": job.step,
                "error_message": job.error,
            }
        )

    @router.get(wire.TRAINING_JOB_EVENTS)
    async def list_events(request: Request, job_id: str, query: Annotated[wire.EventQuery, Query()]) -> wire.EventPage:
        """A page of what was told of a job. One that has nothing new is held for a second, in case there will be."""
        job = await _own_id(service, request, job_id)
        after = 0 if query.after is None else number_of(query.after)
        mark = news.mark(job)
        if news.nothing_after(job, after) and not await news.wait(job, mark=mark, limit_s=limits.poll_s):
            return wire.EventPage(data=[], has_more=False)
        mark = news.mark(job)
        found, more = await service.transactions(events_after, job, after=after, limit=query.limit)
        if not more:
            news.learn(job, found[-1].number if found else after, mark=mark)
        data = [wire.Event(id=str(event.number), type=event.type, data=event.data) for event in found]
        return wire.EventPage(data=data, has_more=more)

    return router


def _read_job(file: Path, own: Callable[[str], ModelRecord]) -> tuple[ModelRecord, int]:
    """The model of a job, and how many trajectories it has. Raises ApiError for what can't be trained on."""
    asked = message_of(file.read_bytes(), wire.CreateTrainingJob)
    record = own(asked.model_id)
    return record, sum(len(group) for group in read_groups(asked.trajectory_groups))


async def _own(service: Service, request: Request, job_id: str) -> Job:
    """A job of the key's entity. Raises ApiError, 404."""
    entity: str = request.state.entity
    job = None
    if len(job_id) == _JOB_ID_LENGTH and job_id.isascii() and job_id.isalnum():
        job = await service.transactions(find_job, job_id, entity=entity)
    if job is None:
        raise ApiError(404, f"There is no job {job_id[:100]!r}.", code="job_not_found", param="job_id")
    service.news.owned_by(job.id, entity)
    return job


async def _own_id(service: Service, request: Request, job_id: str) -> str:
    """The id, once it is known to be the entity's; who polls is not looked up each time."""
    if service.news.owner(job_id) == request.state.entity:
        return job_id
    return (await _own(service, request, job_id)).id
