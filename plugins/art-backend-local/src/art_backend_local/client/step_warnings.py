"""What a user is warned of when a step is over, read from its metrics.

Knows which figures are worth a word, and how often it is said; not what computes them.
"""

from __future__ import annotations

import warnings

from art_core import LocalTrainResult, ModelKey
from art_engine_kit.altered_sampling import sampled_otherwise
from art_engine_kit.mismatch import far_off
from art_engine_kit.split_histories import often_split


class StepWarnings:
    """The warnings of one backend's steps."""

    def __init__(self) -> None:
        self._told: set[tuple[ModelKey, str]] = set()

    def tell(self, model: ModelKey, result: LocalTrainResult) -> None:
        """Warn of a step whose rollouts are of another policy; once for a model, of conversations that fall apart and
        of choices that were drawn otherwise than their logprobs say.
        """
        said = [far_off(result.metrics)]
        for once in (often_split, sampled_otherwise):
            sentence = once(result.metrics)
            if sentence and (model, once.__name__) not in self._told:
                self._told.add((model, once.__name__))
                said.append(sentence)
        for sentence in filter(None, said):
            warnings.warn(f"step {result.step} of {model.name!r}: {sentence}", RuntimeWarning, stacklevel=3)
