"""What a training step is made of before it is packed: token rows, and which of their tokens were sampled.

Plain numpy data, no torch and no tokenizer. A row is one token sequence; a trajectory may have several, and every row
of a trajectory shares its advantage and its weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One token sequence as the policy saw it.

    `token_ids` has shape [length]. `trained` holds the positions of the sampled tokens, ascending, each at least 1;
    `old_logprobs` their logprobs under the policy that sampled them, NaN where unknown; both have shape [trained
    tokens]. `trajectory` is the index of the row's trajectory in its `TokenizedStep`.
    """

    token_ids: Ints
    trained: Ints
    old_logprobs: Floats
    trajectory: int

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class TokenizedStep:
    """The trainable rows of a step.

    `advantages` holds one value a trajectory, from the rewards of its group, never 0. `trained_tokens` is the number of
    sampled tokens of each trajectory over all its rows. `metrics` counts what was given and what was left out, and why.
    `lengths` are those of the longest sequences of the trajectories with something to train on, too long ones included.
    """

    rows: list[TokenRow]
    advantages: npt.NDArray[np.float64]
    trained_tokens: npt.NDArray[np.int64]
    metrics: dict[str, float] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, a token that several rows share counted once a row."""
        return sum(len(row) for row in self.rows)
