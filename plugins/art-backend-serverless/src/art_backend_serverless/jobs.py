"""A job at the service, followed by its events to its end.

Knows the wire's events and how long one may be silent; knows neither models nor what is done with a checkpoint.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from art_core.errors import ArtError, TrainingFailed

from . import wire
from .errors import JobStalled, ServiceRefused, without_key
from .progress import JobProgress
from .service import Connection, Service

OnGradientStep: TypeAlias = Callable[[int, int, dict[str, float]], Awaitable[None]]
NUM_GRADIENT_STEPS = "data/step_num_gradient_steps"
_PAGE = 1000


@dataclass
class Outcome:
    """What a job said before it ended well; `step` is None where the service names none."""

    metrics: dict[str, float] = field(default_factory=dict)
    step: int | None = None


async def follow(
    service: Service, connection: Connection, job_id: str, progress: JobProgress, on_gradient_step: OnGradientStep
) -> Outcome:
    """Wait for the end of a job. Pauses between looks grow while nothing happens. `on_gradient_step` is told how many
    the optimizer took, of how many as far as that is known, and the metrics of each.

    Raises TrainingFailed with the service's reason, JobStalled with what was last heard, ServiceUnreachable. Whatever
    ends the waiting, also a cancellation, names the job, which may still finish.
    """
    try:
        return await _Following(service, connection, job_id, progress, on_gradient_step).to_the_end()
    except TrainingFailed:
        raise
    except ArtError as error:
        error.add_note(_may_finish(job_id))
        raise
    except asyncio.CancelledError as error:
        error.add_note(_may_finish(job_id))
        progress.say(_may_finish(job_id))
        raise


def _may_finish(job_id: str) -> str:
    return (
        f"The training job {job_id} is not waited for any more. The service has no call that ends a job, so it may"
        " still finish and publish its step; model.get_step() will tell."
    )


class _Following:
    def __init__(
        self,
        service: Service,
        connection: Connection,
        job_id: str,
        progress: JobProgress,
        on_gradient_step: OnGradientStep,
    ) -> None:
        self._on_gradient_step = on_gradient_step
        self._service, self._connection, self._job_id, self._progress = service, connection, job_id, progress
        self._outcome = Outcome()
        self._seen: set[str] = set()
        self._last: wire.Event | None = None
        self._heard_at = time.monotonic()
        self._ended = False
        self._sequences = 0
        self._gradient_steps: list[dict[str, float]] = []
        self._phase = ""

    async def to_the_end(self) -> Outcome:
        patience = self._service.patience
        self._progress.phase("submitted", line=False)
        looks = 0
        while not self._ended:
            began = time.monotonic()
            if await self._look():
                looks = 0
                continue
            if self._last is None:
                self._progress.phase("queued")
            silent_s = time.monotonic() - self._heard_at
            if silent_s >= patience.job_silence_s:
                raise await self._stalled(silent_s)
            looks += 1
            # A service that holds a question until there is something to tell needs no pause.
            pause_s = patience.poll_pause(looks) - (time.monotonic() - began)
            await asyncio.sleep(max(0.001, min(pause_s, patience.job_silence_s - silent_s)))
        if not self._outcome.metrics:
            self._outcome.metrics = _means(self._gradient_steps)
        self._outcome.metrics.setdefault(NUM_GRADIENT_STEPS, float(len(self._gradient_steps)))
        return self._outcome

    async def _look(self) -> bool:
        """Read the next page; True when something new was in it, so that more may follow at once."""
        page = await self._connection.get(
            wire.TRAINING_JOB_EVENTS.format(job_id=self._job_id),
            wire.EventPage,
            doing=f"asking what becomes of the training job {self._job_id}",
            query=wire.EventQuery(after=None if self._last is None else self._last.id, limit=_PAGE),
        )
        # A page may come twice, or hold what was seen before.
        new = [event for event in page.data if event.id not in self._seen]
        for event in new:
            self._seen.add(event.id)
            self._last = event
            self._heard_at = time.monotonic()
            await self._take(event.type, event.data)
            if self._ended:
                break
        return bool(new)

    async def _take(self, kind: str, data: Mapping[str, Any]) -> None:
        progress = self._progress
        if kind == "queued":
            place = data.get("place")
            progress.phase("queued" if place is None else f"queued, place {place}")
        elif kind == "training_started":
            self._sequences = _whole(data.get("num_sequences")) or 0
            progress.phase("training", f"{self._sequences} sequences" if self._sequences else "")
        elif kind == "phase":
            progress.phase(str(data.get("phase")))
        elif kind == "gradient_step":
            await self._take_gradient_step(data)
        elif kind == "training_ended":
            self._outcome.step = _whole(data.get("step"))
            metrics = data.get("metrics")
            self._outcome.metrics = numbers(metrics) if isinstance(metrics, Mapping) else {}
            self._ended = True
        elif kind == "training_failed":
            reason = without_key(str(data.get("error_message") or "it gave no reason"), self._service.api_key)
            raise TrainingFailed(
                f"The training job {self._job_id} failed at {self._service.base_url}: {reason.rstrip('.')}. The step"
                " before it is still served."
            )

    async def _take_gradient_step(self, data: Mapping[str, Any]) -> None:
        told = data.get("metrics")
        metrics = numbers(told if isinstance(told, Mapping) else data)
        self._gradient_steps.append(metrics)
        # Counted by a server of one's own, which may have tried the step before; elsewhere here.
        done = _whole(data.get("gradient_step")) or len(self._gradient_steps)
        total = max(done, _whole(data.get("num_gradient_steps")) or self._sequences)
        loss = metrics.get("loss/train", metrics.get("loss"))
        self._progress.advance(done, total, "" if loss is None else f"loss {loss:.4g}")
        await self._on_gradient_step(done, total, metrics)

    async def _stalled(self, silent_s: float) -> JobStalled:
        heard = "nothing at all"
        if self._last is not None:
            heard = f"{self._last.type} {dict(self._last.data)}"
        status = ""
        if await self._service.capabilities(self._connection) is not None:
            try:
                said = await job_status(self._connection, self._job_id)
                status = f" Its state there is {said.state!r}{f', {said.phase}' if said.phase else ''}."
            except ArtError as error:
                status = f" Its state isn't known: {error}"
        return JobStalled(
            f"The training job {self._job_id} at {self._service.base_url} has been silent for {silent_s:.0f} s; the"
            f" last that was heard was {heard}.{status} {_may_finish(self._job_id)} Wait longer with"
            " ServerlessBackend(patience=Patience(job_silence_s=...))."
        )


async def job_status(connection: Connection, job_id: str) -> wire.JobStatus:
    """The state of a job at a server of one's own."""
    return await connection.get(
        wire.TRAINING_JOB.format(job_id=job_id), wire.JobStatus, doing=f"asking for the training job {job_id}"
    )


async def step_of(connection: Connection, job_id: str) -> int | None:
    """The step that a job made, where the service can say it."""
    try:
        return (await job_status(connection, job_id)).step
    except ServiceRefused as error:
        if error.status in (403, 404, 405):
            return None
        raise


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are numbers: what isn't finite travels as null, and is left out."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the gradient steps that have it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
