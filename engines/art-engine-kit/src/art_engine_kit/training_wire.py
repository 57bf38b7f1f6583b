"""The wire between a backend and a training worker: one job in, a stream of events out.

A worker is an HTTP server on the loopback interface: `GET /health` answers 503 until the base model is loaded and 200
after; `POST /jobs` takes a `TrainJob` and answers with an event stream (`event_stream`) that ends with `ended` or
`failed`. A job may ask to be told when the adapter is written, while the rest of the checkpoint is still being made
(`AdapterWritten`). The bearer token comes to it in the environment variable `ART_WORKER_TOKEN`. Who says `ended` has
saved: `destination` is then a whole checkpoint, with the weights and the optimizer's state of the start when there was
nothing to train on. A client that goes away cancels its job, and nothing is saved. Knows no torch; trajectories travel
in a file that the job names (`groups_file`), so that nothing large crosses the wire.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

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


class KlReference(BaseModel):
    """The policy that KL is measured against: the base model, with the PEFT adapter in `adapter` if one is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapter: Path | None = None


class SupervisedOptions(BaseModel):
    """How replies are trained on: `batch_size` trajectories make one optimizer step, and `learning_rates` has one rate
    for each of these steps, or one for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    learning_rates: list[Annotated[float, Field(ge=0)]] = Field(min_length=1)
    batch_size: int = Field(2, ge=1)


class TrainJob(BaseModel):
    """One training step.

    `start` is the checkpoint to train from and `destination` the folder to save the new one to, which must not exist.
    `groups_file` is what `groups_file.write_groups` wrote. `reference` is all that is said of the KL reference policy,
    None for none: what the options say of it was for whoever made the job. With `supervised` the replies in the file
    are trained on, whatever their rewards, and of `options` only the rows' length is read. `tell_written` asks for
    `AdapterWritten`, which a worker that can't tell leaves out; a worker that can't train on replies refuses the job.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["train"] = "train"
    model: str
    step: int = Field(ge=1)
    start: Path
    destination: Path
    groups_file: Path
    reference: KlReference | None = None
    tell_written: bool = False
    supervised: SupervisedOptions | None = None
    options: TrainOptions = TrainOptions()
    adapter: AdapterOptions = AdapterOptions()

    @model_validator(mode="after")
    def _penalty_has_a_reference(self) -> Self:
        if self.options.kl_penalty_coef > 0 and self.reference is None:
            raise ValueError("kl_penalty_coef is above 0 and the job names no reference to measure KL against")
        return self

    @model_validator(mode="after")
    def _supervised_reads_no_other_option(self) -> Self:
        if self.supervised is not None:
            unread = sorted(self.options.model_dump(exclude_defaults=True).keys() - {"packed_sequence_length"})
            unread += ["reference"] if self.reference is not None else []
            if unread:
                raise ValueError(f"a supervised job has no use for {', '.join(unread)}; leave that out")
        return self


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


class AdapterWritten(BaseModel):
    """The adapter's two files are in `folder`, final, while the rest of the checkpoint is not: a server may load them,
    and nobody may be served by them before `saved`.

    The folder gets its own name later, or goes when the job fails. `prompts` are the token ids that the canary will
    have.
    """

    event: Literal["adapter_written"] = "adapter_written"
    folder: Path
    prompts: list[list[int]]


class JobSaved(BaseModel):
    """The checkpoint is on disk, whole."""

    event: Literal["saved"] = "saved"
    path: Path


class JobEnded(BaseModel):
    """The last event of a job that worked, after `saved`. With 0 gradient steps the start was carried over."""

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
    JobStarted | JobProgress | GradientStep | AdapterWritten | JobSaved | JobEnded | JobFailed,
    Field(discriminator="event"),
]
_EVENT: TypeAdapter[TrainEvent] = TypeAdapter(TrainEvent)


def read_event(line: str | bytes) -> TrainEvent:
    """Read one line of a worker's answer."""
    return _EVENT.validate_json(line)
