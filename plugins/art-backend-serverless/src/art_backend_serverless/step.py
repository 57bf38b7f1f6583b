"""The verbs of a training step on a service, for `art_core.run_step`: the client uploads and follows, the service
trains, saves and deploys. Also what else is uploaded.

Knows the order in which a job is made and followed; knows no hooks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from art_core import (
    CheckpointRef,
    ModelKey,
    PublicationReceipt,
    SavedStep,
    ServerlessTrainResult,
    Trajectory,
    TrajectoryGroup,
)
from art_core.errors import CorruptCheckpoint

from . import wire
from .bodies import Spooled, conversations, message_with_groups, spooled
from .checkpoints import step_after
from .errors import OutcomeUnknown
from .jobs import OnGradientStep, follow, step_of
from .progress import JobProgress
from .service import Connection, Service


@dataclass(frozen=True, kw_only=True)
class RemoteModel:
    """A model at the service. Its names are `wandb-artifact:///entity/project/name`, and with `:stepN` of a step."""

    key: ModelKey
    id: str
    entity: str

    def artifact_name(self, step: int | None = None) -> str:
        """The name under which it is stored and served."""
        suffix = "" if step is None else f":step{step}"
        return f"wandb-artifact:///{self.entity}/{self.key.project}/{self.key.name}{suffix}"

    def checkpoint(self, step: int) -> CheckpointRef:
        """A step that is kept at the service: its path is the artifact's name, and no folder of this machine."""
        return CheckpointRef(self.key, step, Path(self.artifact_name(step)))


class RemoteStep:
    """One step of one model. `submit` sends it and gives the job's id, `before` is the step that is the latest now;
    `on_gradient_step` is told of each that the service tells of.
    """

    def __init__(
        self,
        service: Service,
        model: RemoteModel,
        *,
        before: int,
        submit: Callable[[Connection, JobProgress], Awaitable[str]],
        on_gradient_step: OnGradientStep,
        on_published: Callable[[int], None],
        let_go: Callable[[], None],
        show: bool,
    ) -> None:
        self._service = service
        self._model = model
        self._before = before
        self._submit = submit
        self._on_gradient_step = on_gradient_step
        self._on_published = on_published
        self._let_go = let_go
        self._show = show

    async def train_and_save(self) -> SavedStep[ServerlessTrainResult]:
        """Upload, wait and learn which step came out. By then the service has deployed it."""
        with JobProgress(f"train {self._model.key.name}", enabled=self._show) as progress:
            async with self._service.connected(progress.note) as connection:
                job_id = await self._submit(connection, progress)
                outcome = await follow(self._service, connection, job_id, progress, self._on_gradient_step)
                step = outcome.step
                if step is None:
                    progress.phase("waiting for the checkpoint")
                if step is None and await self._service.capabilities(connection) is not None:
                    step = await step_of(connection, job_id)
                if step is None:
                    step = await step_after(connection, self._model.id, self._before, job_id, self._service.patience)
        result = ServerlessTrainResult(
            step=step, metrics=outcome.metrics, artifact_name=self._model.artifact_name(step)
        )
        return SavedStep(self._model.checkpoint(step), result)

    async def publish(self, checkpoint: CheckpointRef) -> PublicationReceipt:
        """Nothing is left to do: the service served it when the job ended."""
        self._on_published(checkpoint.step)
        return self._receipt(checkpoint)

    async def put_aside(self, checkpoint: CheckpointRef) -> CheckpointRef | PublicationReceipt:
        """It can't be: the service has deployed it, and gives no way back."""
        self._on_published(checkpoint.step)
        return self._receipt(checkpoint)

    async def let_go(self) -> None:
        """Others of this client may train the model."""
        self._let_go()

    def _receipt(self, checkpoint: CheckpointRef) -> PublicationReceipt:
        return PublicationReceipt(
            model=checkpoint.model, step=checkpoint.step, inference_name=self._model.artifact_name(checkpoint.step)
        )


async def training_job(
    service: Service,
    connection: Connection,
    progress: JobProgress,
    message: wire.CreateTrainingJob,
    groups: Sequence[TrajectoryGroup],
) -> str:
    """Submit a job that trains on groups; gives its id."""
    async with _upload(service, connection, progress, message_with_groups(message, groups), "application/json") as body:
        return await _submitted(connection, wire.TRAINING_JOBS, body, _sent(progress, body))


async def sft_job(
    service: Service,
    connection: Connection,
    progress: JobProgress,
    message: wire.CreateSftTrainingJob,
    trajectories: Sequence[Trajectory],
) -> str:
    """Submit a job that trains on conversations, which are uploaded first unless the message says where they are."""
    if not message.training_data_url:
        lines = conversations(trajectories)
        async with _upload(service, connection, progress, lines, "application/jsonl") as body:
            upload = await connection.post(
                wire.UPLOADS,
                wire.Upload,
                doing="uploading the conversations",
                body=body,
                on_sent=_sent(progress, body),
            )
        if (upload.sha256, upload.size) != (body.sha256, body.plain_size):
            raise CorruptCheckpoint(
                f"the conversations arrived damaged: {upload.size} bytes with SHA-256 {upload.sha256}, not"
                f" {body.plain_size} with {body.sha256}. Nothing was trained; try again."
            )
        message = message.model_copy(update={"training_data_url": upload.url})
    return await _submitted(connection, wire.SFT_TRAINING_JOBS, message, lambda _: None)


async def send_log(service: Service, model: RemoteModel, groups: Sequence[TrajectoryGroup], split: str) -> None:
    """Send trajectories that a model logs."""
    message = wire.LogTrajectories(model_id=model.id, trajectory_groups=[], split=split)
    async with service.connected() as connection:
        pieces = message_with_groups(message, list(groups))
        async with _spooled(service, connection, pieces, "application/json") as body:
            path = wire.MODEL_LOG.format(model_id=model.id)
            await connection.post(path, None, doing=f"sending the trajectories of {split!r}", body=body)


async def _submitted(
    connection: Connection, path: str, body: BaseModel | Spooled, on_sent: Callable[[int], None]
) -> str:
    try:
        job = await connection.post(path, wire.Job, doing="submitting the training job", body=body, on_sent=on_sent)
    except OutcomeUnknown as error:
        raise OutcomeUnknown(
            f"{error} Look what the model's latest step is (await model.get_step()) before you train again: a job that"
            " was taken may still be training."
        ) from error
    return job.id


@asynccontextmanager
async def _upload(
    service: Service, connection: Connection, progress: JobProgress, pieces: Iterator[bytes], content_type: str
) -> AsyncIterator[Spooled]:
    progress.phase("preparing the upload")
    async with _spooled(service, connection, pieces, content_type) as body:
        progress.phase("uploading", _in_words(body.size))
        yield body


@asynccontextmanager
async def _spooled(
    service: Service, connection: Connection, pieces: Iterator[bytes], content_type: str
) -> AsyncIterator[Spooled]:
    capabilities = await service.capabilities(connection)
    compress = capabilities is not None and "gzip" in capabilities.content_encodings
    async with spooled(pieces, content_type=content_type, compress=compress) as body:
        yield body


def _sent(progress: JobProgress, body: Spooled) -> Callable[[int], None]:
    def sent(size: int) -> None:
        progress.advance(size, body.size, f"of {_in_words(body.size)}")

    return sent


def _in_words(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
