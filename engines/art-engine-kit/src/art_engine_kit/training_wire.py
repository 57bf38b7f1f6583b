"""The wire between a backend and a training worker: one job in, a stream of events out.

A worker is an HTTP server on the loopback interface: `GET /health` answers 503 until the base model is loaded and 200
after; `POST /jobs` takes a `TrainJob` and answers with one JSON event a line until `ended` or `failed`. The bearer
token comes to it in the environment variable `ART_WORKER_TOKEN`. A client that goes away cancels its job and nothing is
saved. Knows no torch; trajectories travel in a file that the job names, so that nothing large crosses the wire.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from .train_options import TrainOptions

WORKER_TOKEN = "ART_WORKER_TOKEN"


class AdapterOptions(BaseModel):
    """How the worker makes and trains the adapter; from `_internal_config`. Lengths are in tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    peft_args: dict[str, Any] = Field(default_factory=dict)
    trainer_args: dict[str, Any] = Field(default_factory=dict)
    max_seq_length: int = Field(32768, ge=1)
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class TrainJob(BaseModel):
    """One training step.

    `start` is the checkpoint to train from and `destination` the folder to save the new one to, which must not exist.
    `groups_file` holds a list of trajectory groups as `write_groups` writes it. `reference` is the adapter folder of
    the KL reference policy, None for the base model without adapter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["train"] = "train"
    model: str
    step: int = Field(ge=1)
    start: Path
    destination: Path
    groups_file: Path
    reference: Path | None = None
    options: TrainOptions = TrainOptions()
    adapter: AdapterOptions = AdapterOptions()


class JobStarted(BaseModel):
    """What the packed step holds. Tokens are counted once however many trajectories share them."""

    event: Literal["started"] = "started"
    num_sequences: int
    num_rows: int
    packed_tokens: int
    trained_tokens: int


class JobProgress(BaseModel):
    """`done` of `total` packed rows have been through forward and backward."""

    event: Literal["progress"] = "progress"
    done: int
    total: int


class GradientStep(BaseModel):
    """One optimizer step was taken."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    event: Literal["gradient_step"] = "gradient_step"
    index: int
    total: int
    metrics: dict[str, float]


class JobSaved(BaseModel):
    """The checkpoint is on disk, whole."""

    event: Literal["saved"] = "saved"
    path: Path


class JobEnded(BaseModel):
    """The last event of a job that worked. With 0 gradient steps the checkpoint is the one it started from."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    event: Literal["ended"] = "ended"
    metrics: dict[str, float]


class JobFailed(BaseModel):
    """The last event of a job that did not. Nothing was saved."""

    event: Literal["failed"] = "failed"
    error_type: str
    message: str
    traceback: str = ""


TrainEvent = Annotated[
    JobStarted | JobProgress | GradientStep | JobSaved | JobEnded | JobFailed, Field(discriminator="event")
]
_EVENT: TypeAdapter[TrainEvent] = TypeAdapter(TrainEvent)


def read_event(line: str | bytes) -> TrainEvent:
    """Read one line of a worker's answer."""
    return _EVENT.validate_json(line)
