"""What `model.train_sft` and the deprecated `model.train` are configured by."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainConfig(BaseModel):
    """The settings of one training step, for `model.train`; `backend.train` takes them as keyword arguments.

    `grad_accumulation_sequences`: how many sequences make one optimizer step; None leaves it to the backend.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    learning_rate: float = Field(5e-6, ge=0, allow_inf_nan=False)
    kl_penalty_coef: float = Field(0.0, ge=0, allow_inf_nan=False)
    grad_accumulation_sequences: int | None = Field(None, ge=1)

    def as_arguments(self) -> dict[str, Any]:
        """The keyword arguments of `backend.train` that say the same; not every backend knows the optional ones."""
        optional = {
            "kl_penalty_coef": self.kl_penalty_coef or None,
            "grad_accumulation_sequences": self.grad_accumulation_sequences,
        }
        return {"learning_rate": self.learning_rate, **{k: v for k, v in optional.items() if v is not None}}


class TrainSFTConfig(BaseModel):
    """The settings of supervised training, for `model.train_sft`; `backend.train_sft` takes them as keyword arguments.

    A batch of `batch_size` trajectories is one optimizer step, "auto" leaves it to the backend (2). `learning_rate` is
    one rate, or one for each batch (`art.sft.create_lr_schedule` makes them).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True, allow_inf_nan=False)

    learning_rate: Annotated[float, Field(ge=0)] | list[Annotated[float, Field(ge=0)]] = 5e-5
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
