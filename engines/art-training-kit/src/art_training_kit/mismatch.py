"""How far the policy's logprobs are from those that the engine reported of the same tokens, before a step changes it.

Pure functions of tensors; knows neither packing nor what is done about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from art_engine_kit.mismatch import KL, MEAN, OUTSIDE

from .losses import Entries


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Sums over the tokens whose logprob the engine reported, with Δ = log π - log π_engine and ρ = exp Δ."""

    tokens: float = 0.0
    difference: float = 0.0
    outside: float = 0.0
    divergence: float = 0.0

    @classmethod
    def of(cls, logprobs: Tensor, entries: Entries) -> Self:
        """`logprobs` [E] are the policy's own for the entries."""
        reported = entries.old_logprobs if entries.sampled_logprobs is None else entries.sampled_logprobs
        known = ~reported.isnan()
        difference = (logprobs - reported)[known].double()
        ratio = difference.exp()
        return cls(
            tokens=float(known.sum()),
            difference=float(difference.abs().sum()),
            outside=float(((ratio < 0.9) | (ratio > 1.1)).sum()),
            divergence=float((ratio - 1.0 - difference).sum()),
        )

    def __add__(self, other: Mismatch) -> Mismatch:
        return Mismatch(
            self.tokens + other.tokens,
            self.difference + other.difference,
            self.outside + other.outside,
            self.divergence + other.divergence,
        )

    def metrics(self) -> dict[str, float]:
        """Means over the tokens: |Δ| in nats, the share with ρ outside of [0.9, 1.1], and the estimate ρ - 1 - log ρ of
        KL(π_engine ‖ π). Nothing where no token's logprob was reported.
        """
        if not self.tokens:
            return {}
        sums = {MEAN: self.difference, OUTSIDE: self.outside, KL: self.divergence}
        return {name: value / self.tokens for name, value in sums.items()}
