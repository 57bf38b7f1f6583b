"""AdamW over an adapter's parameters, and its state beside the adapter, so that a resumed run takes the very step it
would have.

Knows named parameters and two files. Knows no policy, no loss and no job.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from art_core.errors import CorruptCheckpoint, UnknownArgument
from art_engine_kit.checkpoint_folder import OPTIMIZER_STATE
from art_engine_kit.system_errors import as_os_error

OPTIMIZER_SETTINGS = "optimizer.json"
# What a step learnt from; moments of the one say nothing of the other's gradients.
REWARDS, REPLIES = "rewards", "replies"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class OptimizerOptions(BaseModel):
    """AdamW's settings and the gradient norm's limit, under the names that `trainer_args` has for them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.99, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    max_grad_norm: float = Field(0.1, gt=0)

    @classmethod
    def of(cls, trainer_args: Mapping[str, Any], **defaults: float) -> Self:
        """Read `trainer_args`, with other `defaults` where given. Raises UnknownArgument for one that nothing reads."""
        for name in trainer_args:
            if name not in cls.model_fields:
                raise UnknownArgument(name, where="trainer_args", known=cls.model_fields)
        return cls(**{**defaults, **trainer_args})


class AdapterOptimizer:
    """AdamW over parameters that have names."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], options: OptimizerOptions, learns_from: str = REWARDS
    ) -> None:
        self._parameters = dict(parameters)
        self._learns_from = learns_from
        self.options = options
        self._adamw = torch.optim.AdamW(
            self._parameters.values(),
            lr=0.0,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
            weight_decay=options.weight_decay,
        )

    def clear_gradients(self) -> None:
        """Before the first row of a step."""
        self._adamw.zero_grad(set_to_none=True)

    def step(self, learning_rate: float) -> float:
        """Clip the gradients' norm, take one step, and return the norm before clipping.

        Raises FloatingPointError, and takes no step, when the norm is not finite.
        """
        norm = float(nn.utils.clip_grad_norm_(self._parameters.values(), self.options.max_grad_norm))
        if not norm < float("inf"):
            raise FloatingPointError(
                f"the step diverged: the gradient's norm is {norm} at a learning rate of {learning_rate:g}, so the loss"
                " or the logprobs are not finite. Nothing was saved; the step before is unchanged. Lower the learning"
                " rate, or look at the trajectories' logprobs."
            )
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        return norm

    def save(self, folder: Path) -> None:
        """Write the moments and the step counts, exactly."""
        state = {
            f"{name}.{key}": self._adamw.state[p][key].detach().cpu().contiguous()
            for name, p in self._parameters.items()
            if p in self._adamw.state
            for key in _MOMENTS
        }
        with as_os_error(folder / OPTIMIZER_STATE):
            save_file(state, folder / OPTIMIZER_STATE)
        settings: dict[str, Any] = {"format": 1, "algorithm": "AdamW", "learns_from": self._learns_from}
        settings["options"] = self.options.model_dump()
        (folder / OPTIMIZER_SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")

    def load(self, folder: Path) -> bool:
        """Take up the state saved in `folder`; False when there is none, as in a checkpoint made without training, and
        when it comes from steps that learnt from something else.

        The options stay this optimizer's own. Raises CorruptCheckpoint when the state belongs to other parameters.
        """
        if not (folder / OPTIMIZER_STATE).exists():
            return False
        settings = folder / OPTIMIZER_SETTINGS
        if settings.exists():
            if json.loads(settings.read_bytes()).get("learns_from", REWARDS) != self._learns_from:
                return False
        elif self._learns_from != REWARDS:
            return False
        try:
            state = load_file(folder / OPTIMIZER_STATE)
        except (OSError, SafetensorError) as error:
            raise CorruptCheckpoint(f"{folder / OPTIMIZER_STATE} cannot be read: {error}") from error
        if not state:
            return False
        expected = {f"{name}.{key}" for name in self._parameters for key in _MOMENTS}
        if state.keys() != expected:
            odd = sorted(state.keys() ^ expected)[0]
            raise CorruptCheckpoint(
                f"{folder / OPTIMIZER_STATE} belongs to another adapter: {odd!r} is in one and not in the other."
            )
        for name, parameter in self._parameters.items():
            moments = {key: state[f"{name}.{key}"] for key in _MOMENTS}
            if moments["exp_avg"].shape != parameter.shape:
                raise CorruptCheckpoint(
                    f"{folder / OPTIMIZER_STATE} belongs to another adapter: {name} has another shape."
                )
            self._adamw.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()
            }
        return True
