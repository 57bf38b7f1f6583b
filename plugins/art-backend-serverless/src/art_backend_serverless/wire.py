"""The messages that a client and a training service exchange, with their paths, relative to the base URL.

Knows the names and types of fields and nothing of connections, retries, queues or storage. What only a server of one's
own answers stands apart, below the published part, and a client asks for it only where `Capabilities` names it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from art_core.trajectories import TrajectoryGroup

MODELS = "/preview/models"
MODEL = "/preview/models/{model_id}"
MODEL_LOG = "/preview/models/{model_id}/log"
CHECKPOINTS = "/preview/models/{model_id}/checkpoints"
TRAINING_JOBS = "/preview/training-jobs"
TRAINING_JOB_EVENTS = "/preview/training-jobs/{job_id}/events"
SFT_TRAINING_JOBS = "/preview/sft-training-jobs"

# Of a server of one's own.
CAPABILITIES = "/capabilities"
TRAINING_JOB = "/preview/training-jobs/{job_id}"
UPLOADS = "/preview/uploads"
CHECKPOINT_FILES = "/preview/models/{model_id}/checkpoints/{step}/files"
BLOB = "/preview/models/{model_id}/blobs/{sha256}"
FORK = "/preview/models/{model_id}/fork"

IDEMPOTENCY_KEY = "Idempotency-Key"

Sha256: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Step: TypeAlias = Annotated[int, Field(ge=0)]


class Sent(BaseModel):
    """A request: a field that nobody reads is refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Answered(BaseModel):
    """An answer: fields that a later service adds are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")


class CreateModel(Sent):
    """POST MODELS. Without an entity the key's own is taken."""

    entity: str | None = None
    project: str
    name: str
    base_model: str
    return_existing: bool = False


class Model(Answered):
    id: str
    entity: str
    project: str
    name: str
    base_model: str
    run_id: str | None = None


Groups: TypeAlias = list[dict[str, Any]]


def groups_as_json(groups: Iterable[TrajectoryGroup]) -> Groups:
    """Groups as they travel, nothing dropped: exceptions, additional histories, log probabilities, token ids."""
    return [group.for_logging() for group in groups]


def groups_from_json(groups: Groups) -> list[TrajectoryGroup]:
    """The groups that were sent. Raises pydantic's ValidationError for what is none."""
    return [TrajectoryGroup.model_validate(group) for group in groups]


class LogTrajectories(Sent):
    """POST MODEL_LOG."""

    model_id: str
    trajectory_groups: Groups
    split: str


class Checkpoint(Answered):
    id: str
    step: Step
    metrics: dict[str, float | None] = Field(default_factory=dict)


class PageQuery(Sent):
    """The query of GET CHECKPOINTS; `after` is the id of the last item seen."""

    after: str | None = None
    limit: int = Field(default=100, ge=1, le=1000)
    order: Literal["asc", "desc"] = "asc"


class CheckpointPage(Answered):
    """Where `has_more` is absent, only an empty page is the last; so with events."""

    data: list[Checkpoint]
    has_more: bool | None = None


class DeleteCheckpoints(Sent):
    """DELETE CHECKPOINTS."""

    steps: list[Step]


class DeletedCheckpoints(Answered):
    deleted_count: int
    not_found_steps: list[int] = Field(default_factory=list)


class ExperimentalConfig(Sent):
    """How one step is trained; what is None or absent is left to the service."""

    learning_rate: float | None = None
    ppo: bool | None = None
    epsilon: float | None = None
    epsilon_high: float | None = None
    advantage_balance: float | None = None
    scale_rewards: bool | None = None
    importance_sampling_level: Literal["token", "sequence", "average", "geometric_average"] | None = None
    max_negative_advantage_importance_sampling_weight: float | None = None
    mask_prob_ratio: bool | None = None
    kimi_k2_tau: float | None = None
    precalculate_logprobs: bool | None = None
    # Of a server of one's own, where `Capabilities.train_options` names them.
    kl_penalty_coef: float | None = None
    kl_penalty_reference_step: int | None = Field(default=None, ge=0)
    allow_training_without_logprobs: bool | None = None
    altered_sampling: Literal["train", "refuse"] | None = None
    truncated_importance_sampling: float | None = None
    packed_sequence_length: int | None = Field(default=None, ge=1)
    grad_accumulation_sequences: int | None = Field(default=None, ge=1)
    num_trajectories_learning_rate_multiplier_power: float | None = None


#: Fields of ExperimentalConfig beyond the published ones.
OWN_TRAIN_OPTIONS = (
    *("kl_penalty_coef", "kl_penalty_reference_step", "allow_training_without_logprobs"),
    *("altered_sampling", "truncated_importance_sampling", "packed_sequence_length", "grad_accumulation_sequences"),
    "num_trajectories_learning_rate_multiplier_power",
)


class CreateTrainingJob(Sent):
    """POST TRAINING_JOBS."""

    model_id: str
    trajectory_groups: Groups
    experimental_config: ExperimentalConfig | None = None


class SftConfig(Sent):
    batch_size: int | None = Field(default=None, ge=1)
    learning_rate: float | list[float] | None = None


class CreateSftTrainingJob(Sent):
    """POST SFT_TRAINING_JOBS."""

    model_id: str
    training_data_url: str
    config: SftConfig | None = None


class Job(Answered):
    id: str


class Event(Answered):
    """Published types: training_started {num_sequences}, gradient_step (its metrics), training_ended, training_failed
    {error_message}. A server of one's own adds queued {place} and phase {phase}; an unknown type is passed over.
    """

    id: str
    type: str
    data: dict[str, JsonValue] = Field(default_factory=dict)


class EventQuery(Sent):
    """The query of GET TRAINING_JOB_EVENTS."""

    after: str | None = None
    limit: int = Field(default=100, ge=1, le=1000)


class EventPage(Answered):
    data: list[Event]
    has_more: bool | None = None


class ErrorDetail(Answered):
    """`code` is one word for a program; of these a client makes the error that a local backend would raise:
    base_model_not_served, invalid_trajectories, invalid_name, model_busy, checkpoint_in_use, checkpoint_not_found,
    unsupported.
    """

    message: str
    type: str = "error"
    code: str | None = None


class Error(Answered):
    error: ErrorDetail


class Capabilities(Answered):
    """GET CAPABILITIES. A service that answers 404 has none of these. `train_options` are the names of fields of
    ExperimentalConfig that it takes beyond the published ones.
    """

    entity: str | None = None
    fork: bool = False
    pull: bool = False
    uploads: bool = False
    content_encodings: list[Literal["gzip", "zstd"]] = Field(default_factory=list)
    train_options: list[str] = Field(default_factory=list)


class JobStatus(Answered):
    """GET TRAINING_JOB. `place` counts from 1 while it is queued; `step` is fixed when it starts."""

    id: str
    state: Literal["queued", "running", "succeeded", "failed"]
    phase: Literal["training", "saving", "publishing"] | None = None
    place: int | None = None
    step: int | None = None
    error_message: str | None = None


class Upload(Answered):
    """Answer of POST UPLOADS, whose body is the data itself; `url` goes into `training_data_url`."""

    url: str
    sha256: Sha256
    size: int


class File(Answered):
    path: str
    size: int
    sha256: Sha256


class CheckpointFiles(Answered):
    """GET CHECKPOINT_FILES. GET BLOB gives each, whole or by `Range`."""

    step: Step
    files: list[File]


class Fork(Sent):
    """POST FORK: start this model from another one's latest checkpoint, not after a step."""

    from_model: str
    from_project: str | None = None
    not_after_step: Step | None = None


class Forked(Answered):
    step: Step
