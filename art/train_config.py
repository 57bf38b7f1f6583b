"""What the deprecated `model.train` is configured by."""

from __future__ import annotations

from typing import Any

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
