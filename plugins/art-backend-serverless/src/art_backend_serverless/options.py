"""The keyword arguments of `ServerlessBackend.train` and `train_sft`, and what of them goes over the wire.

Knows names, types and ranges; knows no connection.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from art_core import TrajectoryGroup
from art_core.errors import UnknownArgument

from . import wire

AUTO_BATCH_SIZE: Final = 2
Rate = Annotated[float, Field(ge=0)]
#: Fields that a server of one's own takes besides, where it names them.
OWN: Final = wire.OWN_TRAIN_OPTIONS
#: Fields of ExperimentalConfig that every service takes.
PUBLISHED: Final = tuple(name for name in wire.ExperimentalConfig.model_fields if name not in OWN)
#: Arguments that are said in the wire's words, or concern this client.
_SPOKEN: Final = ("loss_fn", "normalize_advantages", "save_checkpoint", "verbose")


class _Arguments(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def of(cls, arguments: dict[str, Any], *, where: str) -> Self:
        """Read keyword arguments. Raises UnknownArgument for one that isn't here, ValueError for a bad value."""
        for name in arguments:
            if name not in cls.model_fields:
                raise UnknownArgument(name, where=where, known=cls.model_fields)
        try:
            return cls(**arguments)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'arguments'}: {e['msg']}" for e in error.errors())
            raise ValueError(f"{where}: {wrong}") from error


class RemoteTrainOptions(_Arguments):
    """What one step can be told. None leaves it to the service."""

    learning_rate: float = Field(5e-6, ge=0)
    ppo: bool | None = None
    loss_fn: Literal["cispo", "ppo"] | None = None
    normalize_advantages: bool | None = None
    epsilon: float | None = Field(None, ge=0)
    epsilon_high: float | None = Field(None, ge=0)
    advantage_balance: float | None = Field(None, ge=-1, le=1)
    scale_rewards: bool | None = None
    importance_sampling_level: Literal["token", "sequence", "average", "geometric_average"] | None = None
    max_negative_advantage_importance_sampling_weight: float | None = Field(None, gt=0)
    mask_prob_ratio: bool | None = None
    kimi_k2_tau: float | None = None
    precalculate_logprobs: bool | None = None
    kl_penalty_coef: float | None = Field(None, ge=0)
    kl_penalty_reference_step: int | None = Field(None, ge=0)
    allow_training_without_logprobs: bool | None = None
    altered_sampling: Literal["train", "refuse"] | None = None
    truncated_importance_sampling: float | None = Field(None, gt=0)
    packed_sequence_length: int | None = Field(None, ge=1)
    grad_accumulation_sequences: int | None = Field(None, ge=1)
    num_trajectories_learning_rate_multiplier_power: float | None = Field(None, ge=-1, le=1)
    save_checkpoint: bool = True
    verbose: bool = False

    @property
    def own(self) -> list[str]:
        """The given ones that only some services take."""
        return [name for name in OWN if getattr(self, name) is not None]

    def config(self, taken: Collection[str], *, where: str) -> wire.ExperimentalConfig:
        """The message. `taken` are the names that the service takes beyond the published ones.

        Raises UnknownArgument for one that it doesn't take, ValueError for two that contradict each other.
        """
        for name in self.own:
            if name not in taken:
                known = {*PUBLISHED, *_SPOKEN, *(set(OWN) & set(taken))}
                raise UnknownArgument(name, where=where, known=known)
        said: dict[str, Any] = {name: getattr(self, name) for name in (*PUBLISHED, *OWN)}
        said["ppo"] = _same("ppo", self.ppo, "loss_fn", None if self.loss_fn is None else self.loss_fn == "ppo")
        said["scale_rewards"] = _same(
            "scale_rewards", self.scale_rewards, "normalize_advantages", self.normalize_advantages
        )
        return wire.ExperimentalConfig(**said)


class RemoteSftOptions(_Arguments):
    """What one step of supervised fine-tuning can be told."""

    learning_rate: Rate | list[Rate] = 5e-5
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    training_data_url: str | None = None
    save_checkpoint: bool = True

    def config(self, num_trajectories: int | None, *, where: str) -> wire.SftConfig:
        """The message, for so many trajectories; None when they aren't known.

        Raises ValueError when there are several rates and not one for each batch.
        """
        size = None if self.batch_size == "auto" else self.batch_size
        if isinstance(self.learning_rate, list) and num_trajectories is not None:
            batches = -(-num_trajectories // (size or AUTO_BATCH_SIZE))
            if len(self.learning_rate) != batches:
                raise ValueError(
                    f"{where}: learning_rate has {len(self.learning_rate)} rates, and {num_trajectories} trajectories"
                    f" make {batches} batches of {size or AUTO_BATCH_SIZE}; give one rate, or one for each batch."
                )
        return wire.SftConfig(batch_size=size, learning_rate=self.learning_rate)


def check_conversations(group: TrajectoryGroup, url: str | None, *, where: str) -> None:
    """Raise ValueError unless there are trajectories or an address of data, and each is one conversation."""
    if bool(group.trajectories) == (url is not None):
        raise ValueError(
            f"{where}: give trajectories, or training_data_url and an empty list."
            if url is not None
            else f"{where}: there are no trajectories to train on."
        )
    for number, trajectory in enumerate(group):
        if trajectory.additional_histories:
            raise ValueError(
                f"{where}: trajectories[{number}] has additional_histories, and a line of training data is one"
                " conversation. Give each as a trajectory of its own."
            )


def _same(one: str, first: bool | None, other: str, second: bool | None) -> bool | None:
    if first is None or second is None or first == second:
        return second if first is None else first
    raise ValueError(f"ServerlessBackend.train: {one} and {other} contradict each other; give one of them.")
