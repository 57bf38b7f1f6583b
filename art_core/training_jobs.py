"""The wire between a backend and a training worker: one job in, a stream of events out.

A worker is an HTTP server on the loopback interface: `GET /health` answers 503 until the base model is loaded and 200
after; `POST /jobs` takes a `TrainJob` and answers with one JSON event a line until `ended` or `failed`. The bearer
token comes to it in the environment variable `ART_WORKER_TOKEN`. A client that goes away cancels its job and nothing is
saved. Knows no torch; trajectories travel in a file that the job names, so that nothing large crosses the wire.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from .errors import UnknownArgument
from .trajectories import TrajectoryGroup

WORKER_TOKEN = "ART_WORKER_TOKEN"


class TrainOptions(BaseModel):
    """The keyword arguments of `LocalBackend.train`, with their defaults. Each is documented where it takes effect.

    `learning_rate` is AdamW's. `loss_fn` and its clipping: `epsilon` and `epsilon_high` None means the loss's own
    default (CISPO 1 and 4, PPO 0.2 and 0.2). `kl_penalty_coef` needs a reference: the base model, or
    `kl_penalty_reference_step`, or the adapter folder `kl_ref_adapter_path`. `advantage_balance` lies in [-1, 1].
    `packed_sequence_length` is in tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    learning_rate: float = Field(5e-6, ge=0)
    loss_fn: Literal["cispo", "ppo"] = "cispo"
    normalize_advantages: bool = True
    kl_penalty_coef: float = Field(0.0, ge=0)
    kl_penalty_reference_step: int | None = Field(None, ge=0)
    kl_ref_adapter_path: Path | None = None
    epsilon: float | None = Field(None, ge=0)
    epsilon_high: float | None = Field(None, ge=0)
    advantage_balance: float = Field(0.0, ge=-1, le=1)
    scale_rewards: bool = True
    importance_sampling_level: Literal["token", "sequence", "average", "geometric_average"] = "token"
    max_negative_advantage_importance_sampling_weight: float | None = Field(None, gt=0)
    mask_prob_ratio: bool = False
    kimi_k2_tau: float | None = None
    precalculate_logprobs: bool = False
    allow_training_without_logprobs: bool = False
    plot_tensors: bool = False
    truncated_importance_sampling: float | None = Field(None, gt=0)
    packed_sequence_length: int | None = Field(None, ge=1)
    grad_accumulation_sequences: int | None = Field(None, ge=1)
    num_trajectories_learning_rate_multiplier_power: float = 0.0
    save_checkpoint: bool = True
    verbose: bool = False

    @model_validator(mode="after")
    def _one_reference(self) -> Self:
        if self.kl_penalty_reference_step is not None and self.kl_ref_adapter_path is not None:
            raise ValueError(
                "give kl_penalty_reference_step or kl_ref_adapter_path, not both: there is one reference policy"
            )
        return self

    @classmethod
    def of(cls, arguments: dict[str, Any], *, where: str) -> Self:
        """Read keyword arguments. Raises UnknownArgument for one that nothing reads, ValueError for a bad value."""
        for name in arguments:
            if name not in cls.model_fields:
                raise UnknownArgument(name, where=where, known=cls.model_fields)
        try:
            return cls(**arguments)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'arguments'}: {e['msg']}" for e in error.errors())
            raise ValueError(f"{where}: {wrong}") from error


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
_GROUPS: TypeAdapter[list[TrajectoryGroup]] = TypeAdapter(
    list[TrajectoryGroup], config=ConfigDict(ser_json_inf_nan="constants")
)


def read_event(line: str | bytes) -> TrainEvent:
    """Read one line of a worker's answer."""
    return _EVENT.validate_json(line)


def write_groups(groups: list[TrajectoryGroup]) -> bytes:
    """The content of a job's `groups_file`: nothing of a trajectory is dropped."""
    return _GROUPS.dump_json(groups)


def read_groups(path: Path) -> list[TrajectoryGroup]:
    """Read what `write_groups` wrote."""
    return _GROUPS.validate_json(path.read_bytes())
