"""The wire's addresses of models: make, delete, log, fork, and their checkpoints. What a job is, it doesn't know."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

from fastapi import APIRouter, Query, Request, Response

from art_backend_serverless import wire
from art_core import ArtError, BackendCapability, announce, check_name
from art_core.errors import (
    BackendUnreachable,
    CheckpointError,
    CheckpointInUse,
    CheckpointNotFound,
    ModelBusy,
    ProcessFailed,
)
from art_gateway.errors import ApiError

from .answers import DISK_FULL, ERRORS, body_of, leading_to, once, step_id, step_of
from .artifact_names import NAME_PATTERN, ArtifactName
from .inference_page import links_to_inference
from .job_payload import read_groups
from .job_queue import abandon
from .model_records import ModelRecord, checkpoints_page, forget_checkpoints
from .request_bodies import as_message, message_of, read_body, read_message
from .service import Service

# The artifact name of the answer's model, as OpenAPI's links write it.
_ANSWERED_NAME = ArtifactName("{$response.body#/entity}", "{$response.body#/project}", "{$response.body#/name}")
_UNREACHABLE = (BackendUnreachable, ProcessFailed, TimeoutError)


def models_router(service: Service) -> APIRouter:
    """The addresses."""
    router = APIRouter(responses=ERRORS)
    catalogue, hosted, limits = service.catalogue, service.backend, service.limits

    def own(request: Request, model_id: str) -> ModelRecord:
        return catalogue.by_id(model_id, entity=request.state.entity)

    name: dict[str, Any] = {"pattern": NAME_PATTERN}
    named = {"project": name, "name": name, "base_model": service.base_models.schema}
    of_model = ("delete_model", "list_checkpoints", "delete_checkpoints", "list_files", "log_trajectories")
    leads = leading_to(*of_model, model_id="id")
    # A job names its model in the body.
    leads[200]["links"] |= links_to_inference(str(_ANSWERED_NAME))
    leads[200]["links"]["create_training_job"] = {
        "operationId": "create_training_job",
        "requestBody": {"model_id": "$response.body#/id"},
    }

    @router.post(wire.MODELS, responses=leads, **body_of(wire.CreateModel, **named))
    async def create_model(request: Request) -> wire.Model:
        """Make a model, or give the one of that name. Answers when it is served, or after 50 seconds."""
        body = await read_body(request, limit=2**20, limits=limits.bodies)
        asked = await as_message(body, wire.CreateModel)
        entity: str = request.state.entity
        if asked.entity not in (None, entity):
            raise ApiError(404, f"There is no entity {asked.entity!r}.", code="entity_not_found", param="entity")
        service.base_models.check(asked.base_model)

        async def make() -> wire.Model:
            record, new = await catalogue.create(
                entity=entity,
                project=asked.project,
                name=asked.name,
                base_model=asked.base_model,
                return_existing=asked.return_existing,
            )
            registering = hosted.registering(record)
            done, _ = await asyncio.wait({registering}, timeout=limits.register_s)
            if done and (error := registering.exception()) is not None:
                if new:
                    await catalogue.delete(record)
                    hosted.forget(record)
                raise_as_answer(error, record)
            return wire.Model(
                id=record.id,
                entity=record.entity,
                project=record.project,
                name=record.name,
                base_model=record.base_model,
                run_id=record.name,
            )

        return await once(service, request, body, wire.Model, make)

    @router.delete(wire.MODEL, status_code=204)
    async def delete_model(request: Request, model_id: str) -> Response:
        """Delete a model. Jobs of it that wait fail; while one runs, it can't be deleted (409)."""
        record = own(request, model_id)
        if not await service.transactions(abandon, record.id, error="the model was deleted"):
            message = f"A job of {record.name!r} runs; delete the model when it has ended."
            raise ApiError(409, message, code="model_busy", param="model_id")
        await catalogue.delete(record)
        hosted.forget(record)
        await service.exports.forget(record)
        return Response(status_code=204)

    @router.post(wire.MODEL_LOG, status_code=204, **body_of(wire.LogTrajectories))
    async def log_trajectories(request: Request, model_id: str) -> Response:
        """Give trajectories to the trackers that are installed beside the server."""
        record = own(request, model_id)
        async with service.bodies.arriving(request, limit=limits.bodies.job) as arrived:
            asked = await service.bodies.read(_read_log, arrived.file)
        if asked.model_id != record.id:
            message = f"The body names another model, {asked.model_id!r}, than the address."
            raise ApiError(422, message, code="invalid_request", param="model_id")
        try:
            check_name(asked.split, what="split")
        except ValueError as error:
            raise ApiError(422, str(error), code="invalid_name", param="split") from error
        groups = await service.bodies.read(read_groups, asked.trajectory_groups)

        async def log() -> wire.Job:
            told: dict[str, Any] = {"model": hosted.policy(record), "step": catalogue.latest(record)}
            await announce(
                service.registry, "art_log_trajectories", **told, trajectory_groups=groups, split=asked.split
            )
            return wire.Job(id=record.id)

        await once(service, request, arrived.sha256.encode(), wire.Job, log)
        return Response(status_code=204)

    @router.get(wire.CHECKPOINTS)
    async def list_checkpoints(
        request: Request, model_id: str, query: Annotated[wire.PageQuery, Query()]
    ) -> wire.CheckpointPage:
        """A page of the steps that are kept, oldest first unless asked otherwise."""
        record = own(request, model_id)
        after = None if query.after is None else step_of(query.after, record.id)
        found, more = await service.transactions(
            checkpoints_page, record.id, after=after, limit=query.limit, order=query.order
        )
        data = [
            wire.Checkpoint(id=step_id(record.id, kept.step), step=kept.step, metrics=kept.metrics) for kept in found
        ]
        return wire.CheckpointPage(data=data, has_more=more)

    @router.delete(wire.CHECKPOINTS, **body_of(wire.DeleteCheckpoints))
    async def delete_checkpoints(request: Request, model_id: str) -> wire.DeletedCheckpoints:
        """Delete steps. The one that is served can't be (409), and then none is."""
        record = own(request, model_id)
        asked = await read_message(request, wire.DeleteCheckpoints, limits=limits.bodies)
        needs(BackendCapability.DELETE_CHECKPOINTS, service)
        wanted = list(dict.fromkeys(asked.steps))
        try:
            await hosted.registered(record)
            there = set(await hosted.steps(record))
            deleted = await hosted.backend.delete_checkpoints(
                hosted.policy(record), [step for step in wanted if step in there]
            )
        except Exception as error:
            raise_as_answer(error, record)
        await service.transactions(forget_checkpoints, record.id, deleted)
        await service.exports.forget(record, deleted)
        missing = [step for step in wanted if step not in there]
        return wire.DeletedCheckpoints(deleted_count=len(deleted), not_found_steps=missing)

    @router.post(wire.FORK, **body_of(wire.Fork))
    async def fork(request: Request, model_id: str) -> wire.Forked:
        """Start a model from the latest checkpoint of another of the same entity."""
        record = own(request, model_id)
        body = await read_body(request, limit=2**20, limits=limits.bodies)
        asked = await as_message(body, wire.Fork)
        needs(BackendCapability.FORK, service)
        project = record.project if asked.from_project is None else asked.from_project
        source = catalogue.by_name(record.entity, project, asked.from_model)
        # 404 would say that the model of the address isn't there.
        missing = partial(ApiError, 422, code="checkpoint_not_found", param="from_model")
        if source is None:
            raise missing(f"There is no model {asked.from_model[:200]!r} in project {project[:200]!r}.")

        async def make() -> wire.Forked:
            policy = hosted.policy(record)
            try:
                step = await hosted.backend.fork_checkpoint(
                    policy,
                    source.name,
                    from_project=source.backend_project,
                    not_after_step=asked.not_after_step,
                )
                await hosted.registered(record)
                await hosted.steps(record)
                catalogue.published(record, await hosted.backend.get_step(policy))
            except CheckpointNotFound as error:
                raise missing(in_clients_words(str(error), record, source)) from error
            except Exception as error:
                raise_as_answer(error, record, source)
            return wire.Forked(step=step)

        return await once(service, request, body, wire.Forked, make)

    return router


def needs(capability: BackendCapability, service: Service) -> None:
    """Raise ApiError, 422, when the backend doesn't declare it."""
    if capability not in service.backend.capabilities:
        message = f"The backend behind this server can't do this: it doesn't declare {capability}."
        raise ApiError(422, message, code="unsupported")


def in_clients_words(text: str, *records: ModelRecord) -> str:
    """A reason of the backend's with the client's own names of models in it."""
    for record in records:
        text = text.replace(record.backend_project, record.project)
    return text


def raise_as_answer(error: BaseException, *records: ModelRecord) -> NoReturn:
    """What the backend raised, as an answer; what is a mistake of ours stays one."""
    reason = in_clients_words(str(error) or type(error).__name__, *records)
    if isinstance(error, ApiError):
        raise error
    if isinstance(error, _UNREACHABLE):
        raise ApiError(503, reason, code="backend_unavailable", type="server_error", retry_after_s=10) from error
    if isinstance(error, CheckpointNotFound):
        raise ApiError(404, reason, code="checkpoint_not_found") from error
    if isinstance(error, CheckpointInUse):
        raise ApiError(409, reason, code="checkpoint_in_use") from error
    if isinstance(error, CheckpointError | ModelBusy):
        raise ApiError(409, reason, code="conflict") from error
    if isinstance(error, ArtError | ValueError):
        raise ApiError(422, reason, code="refused_by_backend") from error
    if isinstance(error, OSError) and error.errno not in DISK_FULL:
        message = f"This server's machine failed: {reason}. Tell whoever runs it."
        raise ApiError(503, message, code="machine_failed", type="server_error", retry_after_s=30) from error
    raise error


def _read_log(file: Path) -> wire.LogTrajectories:
    return message_of(file.read_bytes(), wire.LogTrajectories)
