"""What one training step can be told: the list of `train`'s options, each with type, default, range and one sentence.

The wire and the losses take the options from here as they are, and docs/training.md has its table from here. Knows no
loss and no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from .keyword_options import KeywordOptions

ImportanceLevel = Literal["token", "sequence", "average", "geometric_average"]


class TrainOptions(KeywordOptions):
    """The keyword arguments of `LocalBackend.train`. Numbers are finite. ρ is exp(new - old logprob) of a token, A its
    advantage.
    """

    learning_rate: float = Field(5e-6, ge=0, description="AdamW's learning rate")
    loss_fn: Literal["cispo", "ppo"] = Field("cispo", description="which of the two losses above")
    normalize_advantages: bool = Field(
        True,
        description="`False`: advantages are r − mean, not divided by the standard deviation (as"
        " `scale_rewards=False`)",
    )
    kl_penalty_coef: float = Field(
        0.0,
        ge=0,
        description="how strongly tokens that drift from the reference policy lose advantage: A += coef · (mean KL − KL"
        " of the token), KL = new − reference logprob, no gradient",
    )
    kl_penalty_reference_step: int | None = Field(
        None, ge=0, description="the step that is the reference; without a reference it is the base model"
    )
    kl_ref_adapter_path: Path | None = Field(
        None,
        description="the folder of a PEFT adapter that is the reference; not together with `kl_penalty_reference_step`",
    )
    epsilon: float | None = Field(None, ge=0, description="ε of the clip; `None`: 1 for CISPO, 0.2 for PPO")
    epsilon_high: float | None = Field(
        None, ge=0, description="ε_high of the clip; `None`: 4 for CISPO, the same as ε for PPO"
    )
    advantage_balance: float = Field(
        0.0, ge=-1, le=1, description="b > 0 scales negative advantages by 1−b, b < 0 positive ones by 1+b"
    )
    scale_rewards: bool = Field(True, description="divide advantages by the group's standard deviation")
    importance_sampling_level: ImportanceLevel = Field(
        "token",
        description='ρ of each `"token"`, of the whole `"sequence"` (the exponential of the mean difference), or the'
        ' two\'s `"average"` or `"geometric_average"`',
    )
    max_negative_advantage_importance_sampling_weight: float | None = Field(
        None, gt=0, description="an upper bound of ρ where the advantage is negative"
    )
    mask_prob_ratio: bool = Field(
        False, description="leave out tokens whose ρ lies outside the clip range, in place of clipping"
    )
    kimi_k2_tau: float | None = Field(
        None, description="τ in A −= τ · (new logprob − old logprob); no gradient goes through it; `None`: none"
    )
    precalculate_logprobs: bool = Field(
        False,
        description="compute the old logprobs anew with the trainer before the step, instead of taking the engine's",
    )
    allow_training_without_logprobs: bool = Field(
        False,
        description="train also on choices, and on assistant messages, that came without token ids and logprobs: they"
        " are tokenized, and ρ is 1",
    )
    altered_sampling: Literal["train", "refuse"] = Field(
        "train",
        description="what is done with choices that were drawn with a temperature other than 1, a filter, a penalty or"
        ' a structure, whose logprobs are the policy\'s own all the same: `"refuse"` stops the step and names them',
    )
    plot_tensors: bool = Field(False, description="save a picture of the packed rows under `plots/`")
    truncated_importance_sampling: float | None = Field(
        None,
        gt=0,
        description="multiply the loss by min(ρ, this), against the difference between engine and trainer; no gradient"
        " goes through it",
    )
    packed_sequence_length: int | None = Field(
        None,
        ge=1,
        description="tokens in a packed row; `None`: chosen from the longest sequence. Longer trajectories are left"
        " out",
    )
    grad_accumulation_sequences: int | None = Field(
        None, ge=1, description="packed rows for one optimizer step; `None`: one for each GPU that trains"
    )
    num_trajectories_learning_rate_multiplier_power: float = Field(
        0.0, ge=-1, le=1, description="the learning rate is multiplied by (number of trajectories) to this power"
    )
    save_checkpoint: bool = Field(True, description="`False`: the step's folder goes once a later step is served")
    verbose: bool = Field(False, description="more lines in the worker's log")

    @model_validator(mode="after")
    def _one_reference(self) -> Self:
        if self.kl_penalty_reference_step is not None and self.kl_ref_adapter_path is not None:
            raise ValueError(
                "give kl_penalty_reference_step or kl_ref_adapter_path, not both: there is one reference policy"
            )
        return self
