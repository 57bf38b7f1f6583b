"""The sequences that train_throughput.py trains on: random token ids in the shapes of real steps.

Knows numpy; packs nothing and measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
TURNS = "turns"


@dataclass(frozen=True)
class TrainedSequence:
    """Token ids, of which those from `begin` on are trained."""

    token_ids: Tokens
    begin: int


def sequences_of(shape: str, vocabulary: range) -> list[TrainedSequence]:
    """`P,R,G` gives G answers of R tokens after one prompt of P tokens. `turns` gives the 32 turns of eight
    conversations after one prompt of 256 tokens, each a sequence of its own, as when a chat template strips what was
    thought from earlier turns: 64 tokens are sampled at each, 16 of them stay in what the next turns see, and the user
    adds 24.

    Raises ValueError for another text.
    """
    tokens = partial(_tokens, np.random.default_rng(0), vocabulary)
    if shape == TURNS:
        return _conversations(tokens)
    try:
        prompt, answer, group = map(int, shape.split(","))
    except ValueError as error:
        raise ValueError(f"a shape is P,R,G, such as 256,32,8, or {TURNS}, not {shape!r}") from error
    if min(prompt, answer, group) < 1:
        raise ValueError(f"each of P,R,G must be at least 1, not {shape!r}")
    asked = tokens(prompt)
    return [TrainedSequence(np.append(asked, tokens(answer)), prompt) for _ in range(group)]


def sharing_nothing(sequences: list[TrainedSequence], vocabulary: range) -> list[TrainedSequence]:
    """As many and as long, with nothing in common."""
    tokens = partial(_tokens, np.random.default_rng(1), vocabulary)
    return [replace(each, token_ids=tokens(len(each.token_ids))) for each in sequences]


def sharing_bound(sequences: list[TrainedSequence]) -> float:
    """All tokens over those that are left when each beginning is held once: G(P+R) / (P+G·R) for one prompt."""
    beginnings = {each.token_ids[:end].tobytes() for each in sequences for end in range(1, len(each.token_ids) + 1)}
    return total_tokens(sequences) / len(beginnings)


def total_tokens(sequences: list[TrainedSequence]) -> int:
    """The effective tokens of a step: those that a trainer without sharing computes."""
    return sum(len(each.token_ids) for each in sequences)


def _conversations(tokens: Callable[[int], Tokens]) -> list[TrainedSequence]:
    made, asked = [], tokens(256)
    for _ in range(8):
        past = asked
        for _ in range(4):
            made.append(TrainedSequence(np.append(past, tokens(64)), len(past)))
            past = np.concatenate([past, made[-1].token_ids[-16:], tokens(24)])
    return made


def _tokens(rng: np.random.Generator, vocabulary: range, count: int) -> Tokens:
    return rng.integers(vocabulary.start, vocabulary.stop, count, dtype=np.int32)
