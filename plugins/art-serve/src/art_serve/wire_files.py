"""The wire's addresses of a checkpoint's files: the list with their hashes, and each by its hash, whole or in part."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import FileResponse, Response

from art_backend_serverless import wire
from art_core import BackendCapability
from art_gateway.errors import ApiError

from .answers import ERRORS
from .model_records import checkpoint_metrics
from .service import Service
from .wire_models import needs, raise_as_answer

_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_LARGEST_STEP = 2**31 - 1


def files_router(service: Service) -> APIRouter:
    """The addresses."""
    router = APIRouter(responses=ERRORS)

    @router.get(wire.CHECKPOINT_FILES)
    async def list_files(
        request: Request, model_id: str, step: Annotated[int, Path(ge=0, le=_LARGEST_STEP)]
    ) -> wire.CheckpointFiles:
        """The files of a step's PEFT folder."""
        record = service.catalogue.by_id(model_id, entity=request.state.entity)
        needs(BackendCapability.PULL, service)
        if await service.transactions(checkpoint_metrics, record.id, step) is None:
            raise ApiError(
                404, f"There is no step {step} of {record.name!r}.", code="checkpoint_not_found", param="step"
            )
        try:
            files = await service.exports.files(record, step)
        except Exception as error:
            raise_as_answer(error, record)
        return wire.CheckpointFiles(step=step, files=files)

    @router.get(
        wire.BLOB,
        response_class=FileResponse,
        responses={
            200: {"content": _BYTES},
            206: {"content": _BYTES, "description": "the part that Range asks for"},
            416: {"description": "Range asks for what isn't there"},
        },
    )
    async def get_blob(request: Request, model_id: str, sha256: wire.Sha256) -> Response:
        """A file by its hash; CHECKPOINT_FILES must have listed it."""
        record = service.catalogue.by_id(model_id, entity=request.state.entity)
        file = await service.exports.blob(record, sha256)
        if file is None:
            message = f"There is no file {sha256} here now; list the checkpoint's files first."
            raise ApiError(404, message, code="blob_not_found", param="sha256")
        headers = {"ETag": f'"{sha256}"', "Cache-Control": "private, immutable"}
        return FileResponse(file, media_type="application/octet-stream", headers=headers)

    return router
