"""What one training step can be told: the list of `train`'s options, with their defaults and ranges.

The wire, the losses and the documents take them from here. Knows no loss and no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from art_core.errors import UnknownArgument


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
