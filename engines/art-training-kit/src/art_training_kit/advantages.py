"""From rewards to what each sampled token weighs in the loss: numbers only, one value a trajectory.

Every sampled token of a trajectory has the same advantage A and the same weight w, so means "over trainable tokens" are
means over trajectories, weighted by how many tokens each has. Knows no tokens and no torch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

_STD_FLOOR = 1e-6
# Of the largest reward, or of 1. Rounding in float64 makes 1e-16, summing up a thousand terms 1e-13.
_ROUNDING = 1e-12


def differ(rewards: Values) -> bool:
    """Whether the rewards of a group differ by more than rounding: by more than 1e-12 of the largest of them, or of 1
    where all are smaller.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.size == 0:
        return False
    return bool(np.ptp(rewards) > _ROUNDING * max(1.0, float(np.abs(rewards).max())))


def group_advantages(rewards: Values, *, scale: bool) -> Values:
    """A = (r - mean) / (population std + 1e-6) within one group, or r - mean when `scale` is off.

    Rewards that don't `differ` give exactly 0. They are at most 1e150 in size, so that their squares are finite.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if not differ(rewards):
        return np.zeros_like(rewards)
    centred: Values = rewards - rewards.mean()
    return centred / (rewards.std() + _STD_FLOOR) if scale else centred


def balance_step(advantages: Values, trained_tokens: npt.NDArray[np.int64], balance: float) -> tuple[Values, Values]:
    """Normalize over a whole step; returns (A, w), one value a trajectory.

    w = 1 / trained tokens of the trajectory, then w /= mean(w). `balance` b > 0 scales negative advantages by 1 - b,
    b < 0 positive ones by 1 + b. Then A /= mean(|A| w). Both means are taken over trained tokens. An A of 0, which b
    = ±1 makes, stays 0.
    """
    if not -1.0 <= balance <= 1.0:
        raise ValueError(
            f"advantage_balance is {balance}; it lies between -1 (only negative advantages) and 1 (only positive)."
        )
    tokens = np.asarray(trained_tokens, dtype=np.float64)
    if tokens.size == 0:
        return np.zeros(0), np.zeros(0)
    if tokens.min() <= 0:
        raise ValueError("every trajectory of a step needs at least one trained token")
    total = tokens.sum()
    weights = 1.0 / tokens
    weights /= (weights * tokens).sum() / total
    balanced = np.array(advantages, dtype=np.float64)
    if balance > 0:
        balanced[balanced < 0] *= 1.0 - balance
    elif balance < 0:
        balanced[balanced > 0] *= 1.0 + balance
    size = (np.abs(balanced) * weights * tokens).sum() / total
    return (balanced / size if size > 0 else balanced), weights
