"""How far a trainer's logprobs are from those that its engine reported: the names of the figures, and when to warn.

Knows metrics by name. What computes them is the training kit's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

MEAN: Final = "loss/mismatch_mean"
OUTSIDE: Final = "loss/mismatch_outside"
KL: Final = "loss/mismatch_kl"
# In nats a token. An engine in bfloat16 is off by 0.01 to 0.06, a policy a few small steps older by a little more.
FAR_OFF: Final = 0.3


def far_off(metrics: Mapping[str, float]) -> str:
    """What to tell of a step whose rollouts were sampled from quite another policy; empty where there is nothing to."""
    mean = metrics.get(MEAN, 0.0)
    if not mean > FAR_OFF:
        return ""
    return (
        f"the trainer's logprobs are off by {mean:.2f} nats a token in the mean from those that the rollouts came with,"
        f" and {metrics.get(OUTSIDE, 0.0):.0%} of the tokens have a probability ratio outside of 0.9 to 1.1. The"
        " rollouts are of a much older step, or of another model, or were sampled with a filter (top_p, top_k) or a"
        " temperature that their logprobs don't show. Sample them from the served step, or bound what they weigh with"
        " train(truncated_importance_sampling=2.0)."
    )
