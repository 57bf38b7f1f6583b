"""Takes jobs from the queue, one after the other, and has the backend train them; writes down what becomes of each.

A job is trained once, whenever this process is killed: its step is fixed before it begins, and one that the backend
has already is not made again. Knows the Backend protocol and the queue; no HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from art_backend_serverless import wire
from art_core import BackendCapability, TrainResult, TrajectoryGroup
from art_core.errors import BackendUnreachable, ProcessFailed
from art_gateway.errors import ApiError

from .catalogue import Catalogue
from .hosted_backend import HostedBackend, ServedPolicy
from .in_threads import Transactions
from .job_events import NewEvent, tell
from .job_payload import JobPayload, read_conversations, read_groups, train_options
from .job_queue import Job, LeaseLost, claim, finish, fix_step, heartbeat, tell_places
from .kept_files import KeptFiles
from .model_records import ModelRecord, checkpoint_metrics, keep_checkpoint
from .news import News

LEASE_S = 60.0
_HEARTBEAT_S = 10.0
_LOOK_EVERY_S = 5.0
_AGAIN_S = (0.1, 0.5, 1.0, 2.0, 5.0)
_ATTEMPTS = 3
_log = logging.getLogger("art_serve.training")
P = ParamSpec("P")
T = TypeVar("T")


class TrainingWorker:
    """One task, `run`, which the server owns. `worker` is a name that no other process ever has."""

    def __init__(
        self,
        worker: str,
        *,
        backend: HostedBackend,
        catalogue: Catalogue,
        transactions: Transactions,
        files: KeptFiles,
        news: News,
    ) -> None:
        self._worker = worker
        self._backend = backend
        self._catalogue = catalogue
        self._transactions = transactions
        self._files = files
        self._news = news
        self._wanted = asyncio.Event()
        self.running: Job | None = None
        self.phase: str | None = None
        self.at_work = False
        self._untold: list[NewEvent] = []
        self._last_gradient_step: dict[str, float | None] = {}
        self._telling: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """A job was queued."""
        self._wanted.set()

    async def run(self) -> None:
        """Work until cancelled. A job that is cut off is taken up again by the next worker."""
        self.at_work = True
        try:
            await self._run()
        finally:
            self.at_work = False

    async def _run(self) -> None:
        while True:
            self._wanted.clear()
            job = await self._persist(claim, self._worker, lease_s=LEASE_S)
            if job is None:
                try:
                    await asyncio.wait_for(self._wanted.wait(), _LOOK_EVERY_S)
                except TimeoutError:
                    continue
            else:
                for waiting in await self._persist(tell_places):
                    self._news.told(waiting)
                await self._take(job)

    async def enter(self, phase: str, model: Any) -> None:
        """The step of a model is in this phase now; of another than the running job's nothing is told. The step doesn't
        wait for the database.
        """
        if (job := self._job_of(model)) is not None:
            self.phase = phase
            self._soon_tell(job, ("phase", {"phase": phase}))

    async def advance(self, model: Any, done: int, total: int, metrics: dict[str, float]) -> None:
        """The optimizer has taken so many of its steps. The last of them is told when the job has ended, with what is
        known of the step only then: the published client knows no other place for it.
        """
        if (job := self._job_of(model)) is None:
            return
        counted = {"gradient_step": done, "num_gradient_steps": total}
        self._last_gradient_step = {**_numbers(finite(metrics)), **counted}
        if done < total:
            self._soon_tell(job, ("gradient_step", self._last_gradient_step))

    def _job_of(self, model: Any) -> Job | None:
        job = self.running
        record = None if job is None else self._catalogue.known(job.model_id)
        return None if record is None or model is not self._backend.policy(record) else job

    def _soon_tell(self, job: Job, event: NewEvent) -> None:
        self._untold.append(event)
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell(job), name=f"tell of {job.id}")

    async def _tell(self, job: Job) -> None:
        while self._untold:
            events = tuple(self._untold)
            await self._persist(tell, job.id, *events)
            del self._untold[: len(events)]
            self._news.told(job.id)

    async def _take(self, job: Job) -> None:
        self.running, self.phase, self._last_gradient_step = job, None, {}
        _log.info("job begins", extra={"job": job.id, "model": job.model_id})
        work = asyncio.create_task(self._work(job), name=f"train {job.id}")
        beat = asyncio.create_task(self._keep_lease(job), name=f"hold {job.id}")
        try:
            await asyncio.wait((work, beat), return_when=asyncio.FIRST_COMPLETED)
        finally:
            beat.cancel()
            work.cancel()
            outcome, _ = await asyncio.gather(work, beat, return_exceptions=True)
            if self._telling is not None:
                self._telling.cancel()
                await asyncio.gather(self._telling, return_exceptions=True)
            self._untold.clear()
            self.running = self.phase = self._telling = None
        if isinstance(outcome, LeaseLost):
            _log.warning("job was given to another worker", extra={"job": job.id})
        elif isinstance(outcome, Exception):
            raise outcome

    async def _keep_lease(self, job: Job) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT_S)
            await self._persist(heartbeat, job.id, self._worker, lease_s=LEASE_S)

    async def _work(self, job: Job) -> None:
        try:
            record = self._catalogue.known(job.model_id)
            if record is None:
                raise ApiError(404, "the model was deleted", code="model_not_found")
            result, step = await self._train(job, record)
        except (DBAPIError, LeaseLost):
            raise
        except Exception as error:
            # PostgreSQL takes no NUL in a text, and a log's last lines may hold one.
            reason = (str(error) or type(error).__name__).replace("\0", "\N{REPLACEMENT CHARACTER}")
            _log.warning("job failed: %s", reason, extra={"job": job.id}, exc_info=not isinstance(error, ApiError))
            await self._end(job, error=reason, events=[("training_failed", {"error_message": reason})])
            return
        await self._persist(keep_checkpoint, record.id, step, result)
        self._catalogue.published(record, step)
        told = {**_numbers(result), **self._last_gradient_step}
        events: list[NewEvent] = [("gradient_step", told), ("training_ended", {"step": step, "metrics": result})]
        await self._end(job, error=None, events=events)

    async def _train(self, job: Job, record: ModelRecord) -> tuple[dict[str, float | None], int]:
        """The metrics of the job's step, and the step: trained now, or found trained already."""
        payload = JobPayload.model_validate_json(job.payload)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                await self._backend.registered(record)
                policy = self._backend.policy(record)
                latest = await self._backend.backend.get_step(policy)
                started: list[NewEvent] = [("training_started", {"num_sequences": payload.num_sequences})]
                step = await self._persist(fix_step, job.id, self._worker, latest + 1, events=started)
                self._news.told(job.id)
                if latest >= step:
                    return await self._metrics_of(record, policy, step), step
                if step in await self._backend.backend.list_steps(policy):
                    raise RuntimeError(
                        f"step {step} was trained and saved, and could not be published; step {latest} is served."
                        " The server's log says why."
                    )
                result = await self._ask(payload, record, policy)
                if result.step != step:
                    _log.warning("the backend made step %d, not %d", result.step, step, extra={"job": job.id})
                return finite(result.metrics), result.step
            except (BackendUnreachable, ProcessFailed) as error:
                if attempt == _ATTEMPTS:
                    raise
                _log.warning("the backend went away, asking again: %s", error, extra={"job": job.id})
                self._backend.register_again(record)
                await asyncio.sleep(_AGAIN_S[-1])
        raise AssertionError("unreachable")

    async def _ask(self, payload: JobPayload, record: ModelRecord, policy: ServedPolicy) -> TrainResult:
        backend = self._backend.backend
        if payload.url is not None:
            file = await asyncio.to_thread(self._files.upload, record.entity, payload.url)
            if file is None:
                raise RuntimeError("the uploaded file is no longer here; upload it and submit the job again")
            conversations = await asyncio.to_thread(read_conversations, file)
            return await backend.train_sft(policy, conversations, **payload.options)
        body = await asyncio.to_thread(self._files.read_job, payload.file or "")
        request, groups = await asyncio.to_thread(_read_rl, body)
        return await backend.train(policy, groups, **train_options(request.experimental_config))

    async def _metrics_of(self, record: ModelRecord, policy: ServedPolicy, step: int) -> dict[str, float | None]:
        """What is known of a step that was made before this process began."""
        kept = await self._transactions(checkpoint_metrics, record.id, step)
        if kept or BackendCapability.PULL not in self._backend.capabilities:
            return kept or {}
        folder = await self._backend.backend.pull_checkpoint(policy, step=step)
        return await asyncio.to_thread(_own_metrics, folder)

    async def _end(self, job: Job, *, error: str | None, events: list[NewEvent]) -> None:
        if self._telling is not None:
            await self._telling
        await self._persist(finish, job.id, self._worker, error=error, events=events)
        self._news.told(job.id, over=True)
        file = JobPayload.model_validate_json(job.payload).file
        if file is not None:
            await asyncio.to_thread(self._files.forget_job, file)
        _log.info("job ended", extra={"job": job.id, "error": error})

    async def _persist(self, function: Callable[Concatenate[Engine, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Write, as long as it takes: a database that is locked or away comes back, and a result must not be lost."""
        for pause in (*_AGAIN_S, *(_AGAIN_S[-1] for _ in range(1000))):
            try:
                return await self._transactions(partial(function), *args, **kwargs)
            except (OperationalError, InterfaceError) as error:
                _log.warning("the database doesn't answer, trying again in %g s: %s", pause, error.orig)
                await asyncio.sleep(pause)
        raise RuntimeError("the database has been away for more than an hour; the server ends")


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON has them: what is not finite becomes null."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Those that are some: the published client makes a number of everything that an event of it holds."""
    return {name: value for name, value in metrics.items() if value is not None}


def _own_metrics(folder: Path) -> dict[str, float | None]:
    """The metrics that a checkpoint's own manifest holds, where it has one."""
    try:
        manifest = json.loads((folder / "checkpoint.json").read_bytes())
        return finite({str(name): float(value) for name, value in manifest["metrics"].items()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}


def _read_rl(body: bytes) -> tuple[wire.CreateTrainingJob, list[TrajectoryGroup]]:
    request = wire.CreateTrainingJob.model_validate_json(body)
    return request, read_groups(request.trajectory_groups)
