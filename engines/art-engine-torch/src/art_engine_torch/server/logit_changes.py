"""What a request changes of the logits before a token is drawn: a structure's mask, a bias, penalties.

The logprobs of an answer are taken before all of this. Knows one row of logits at a time, and of a sequence its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .prefix_cache import Tokens
from .structure import Guide


@dataclass(frozen=True)
class LogitSettings:
    """`bias` is added to the logits of its tokens. `presence` and `frequency` are taken off those that the answer has,
    once or for each time; logits of tokens that prompt or answer have are divided by `repetition` where they are above
    0, multiplied by it below.
    """

    bias: Mapping[int, float] = field(default_factory=dict)
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0

    @property
    def change(self) -> bool:
        """Whether they change anything."""
        return bool(self.bias or self.presence or self.frequency) or self.repetition != 1.0


@dataclass(frozen=True)
class ChangedRow:
    """`logits` float32 [vocab] to draw from. `allowed_logprob` is how likely the policy's own next token is one that
    the structure allows, as a logarithm; 0 without a structure.
    """

    logits: Tensor
    allowed_logprob: float


def changed_row(
    row: Tensor, settings: LogitSettings, guide: Guide | None, prompt: Tokens, answer: Sequence[int]
) -> ChangedRow:
    """A copy of a row of logits as the request wants it; `row` stays as it is.

    Raises RuntimeError when the structure leaves no token.
    """
    logits, allowed = row.clone(), 0.0
    if guide is not None:
        mask = guide.allowed(len(row))
        if not mask.any():
            raise RuntimeError("the structure leaves no token to go on with")
        logits.masked_fill_(torch.from_numpy(~mask).to(row.device), -math.inf)
        allowed = float(torch.logsumexp(logits, 0) - torch.logsumexp(row, 0))
    if settings.repetition != 1.0:
        seen = torch.from_numpy(np.unique(np.concatenate([prompt, np.array(answer, np.int32)])).astype(np.int64))
        seen = seen.to(row.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / settings.repetition, values * settings.repetition)
    if (settings.presence or settings.frequency) and answer:
        ids, counts = np.unique(np.array(answer, np.int64), return_counts=True)
        less = settings.presence + settings.frequency * counts
        logits[torch.from_numpy(ids).to(row.device)] -= torch.from_numpy(less).to(row.device, row.dtype)
    if settings.bias:
        at = torch.tensor(list(settings.bias), device=row.device)
        logits[at] += torch.tensor(list(settings.bias.values()), device=row.device, dtype=row.dtype)
    return ChangedRow(logits, min(allowed, 0.0))
