"""What a user is warned of when a step is over, read from its metrics.

Knows which figures are worth a word, and how often it is said; not what computes them.
"""

from __future__ import annotations

import warnings

from art_core import LocalTrainResult, ModelKey
from art_engine_kit.mismatch import far_off
from art_engine_kit.split_histories import often_split


class StepWarnings:
    """The warnings of one backend's steps."""

    def __init__(self) -> None:
        self._told_of_splits: set[ModelKey] = set()

    def tell(self, model: ModelKey, result: LocalTrainResult) -> None:
        """Warn of a step whose rollouts are of another policy; once for a model, of conversations that fall apart."""
        said = [far_off(result.metrics)]
        if model not in self._told_of_splits and (split := often_split(result.metrics)):
            self._told_of_splits.add(model)
            said.append(split)
        for sentence in filter(None, said):
            warnings.warn(f"step {result.step} of {model.name!r}: {sentence}", RuntimeWarning, stacklevel=3)
