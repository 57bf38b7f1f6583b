"""Next tokens as plainly as they can be had: one adapter merged into weights of its own, several rows side by side.

For tiny models and the reference backend only. Knows models and token ids; knows no backend.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .oracle import oracle_for


class Rows:
    """Sequences of one length that grow by a token at a time."""

    def __init__(self, prompt: Sequence[int], count: int) -> None:
        self._next = [list(prompt)] * count
        self._past: Any = None

    def logprobs(self, base: Path, adapter: Path) -> NDArray[np.float64]:
        """Of every row's next token, as an adapter has them: shape (rows, vocabulary)."""
        import torch

        with torch.inference_mode():
            answer = _merged(base, adapter)(input_ids=torch.tensor(self._next), past_key_values=self._past)
            self._past = answer.past_key_values
            result: NDArray[np.float64] = torch.log_softmax(answer.logits[:, -1].double(), -1).numpy()
        return result

    def append(self, tokens: Sequence[int]) -> None:
        """Let each row go on with its token."""
        self._next = [[token] for token in tokens]


@functools.lru_cache(32)
def _merged(base: Path, adapter: Path) -> Any:
    return copy.deepcopy(oracle_for(base).with_adapter(adapter)).merge_and_unload()
