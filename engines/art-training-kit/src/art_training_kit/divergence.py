"""Notices a step after which nothing could be learnt or served any more, and says so with its figures.

Knows an adapter's weights and a step's metrics; saves and loads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from art_core.errors import TrainingFailed
from art_engine_kit.training_wire import TrainJob

from .policy import Policy

# A LoRA's weights stay below 1, and an AdamW step moves them by about the learning rate.
_GROWTH: Final = 10.0


def refuse_diverged(job: TrainJob, problem: str, last: Mapping[str, float]) -> None:
    """Raise TrainingFailed where there is a problem; `last` are the metrics of the last gradient step."""
    if problem:
        raise TrainingFailed(
            f"step {job.step} of {job.model} diverged: {problem}. Its learning rate was"
            f" {last['loss/learning_rate']:g}, the gradient's norm {last['loss/grad_norm']:.4g} before clipping."
            " Nothing of it was kept; the step before is unchanged and still served. Train it again with a smaller"
            " learning_rate."
        )


def grown_from(largest: float, policy: Policy) -> str:
    """What is wrong with the adapter's weights, the largest of which was this large before the step; empty when
    nothing is.
    """
    now = largest_weight(policy)
    if now <= _GROWTH * max(1.0, largest):
        return ""
    return f"the adapter's largest weight went from {largest:.2g} to {now:.2g}"


def largest_weight(policy: Policy) -> float:
    """Of the adapter, in size; NaN when one of them is."""
    weights = policy.adapter_parameters().values()
    return float(torch.stack([weight.detach().abs().max().float() for weight in weights]).max())
