"""Whether the server lives, whether it can take work, and its figures. Knows nothing of any model."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from .answers import ERRORS
from .job_queue import JobState, count_by_state
from .request_log import Figures
from .service import Service

_LIMIT_S = 5.0


def health_router(service: Service) -> APIRouter:
    """`/health` and `/ready`, which need no key."""
    router = APIRouter(tags=["health"])

    @router.get("/health")
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @router.get("/ready", responses={503: {"description": "it can't take work now"}})
    async def ready() -> Response:
        """The database answers, and the worker that trains is at work."""
        try:
            await asyncio.wait_for(service.transactions(count_by_state), _LIMIT_S)
        except Exception as error:
            return JSONResponse({"status": "not ready", "reason": f"the database: {type(error).__name__}"}, 503)
        if not service.worker.at_work:
            return JSONResponse({"status": "not ready", "reason": "the training worker has ended"}, 503)
        return JSONResponse({"status": "ok"})

    return router


def figures_router(service: Service, figures: Figures) -> APIRouter:
    """`/metrics`, which needs a key as everything else does."""
    router = APIRouter(tags=["health"], responses=ERRORS)

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        counts = await service.transactions(count_by_state)
        for state in JobState:
            figures.jobs.labels(state.value).set(counts.get(state.value, 0))
        figures.models.set(len(service.catalogue))
        return Response(generate_latest(figures.registry), media_type=CONTENT_TYPE_LATEST)

    return router
