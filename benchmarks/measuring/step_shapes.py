"""Steps of many shapes as rows of random token ids, to see what packing makes of each.

Knows numpy and token rows; measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from art_training_kit.rows import TokenRow

VOCABULARY = 49152
Tokens = npt.NDArray[np.int32]
Length = tuple[int, int]  # drawn evenly from the first up to the second


@dataclass(frozen=True)
class Shape:
    """Rows of one kind, and how many tokens a packed row may have."""

    name: str
    capacity: int
    make: Callable[[np.random.Generator], list[Tokens]]

    def rows(self, seed: int = 0) -> list[TokenRow]:
        """The same rows for the same seed; the last token of each is its sampled one."""
        return [
            TokenRow(
                np.append(tokens, 1).astype(np.int32),
                np.array([len(tokens)], np.int32),
                np.zeros(1, np.float32),
                trajectory,
            )
            for trajectory, tokens in enumerate(self.make(np.random.default_rng(seed)))
        ]


def drawn(rng: np.random.Generator, length: Length) -> Tokens:
    """Random token ids."""
    return rng.integers(3, VOCABULARY, int(rng.integers(*length, endpoint=True)), dtype=np.int32)


def groups(
    rng: np.random.Generator, count: int, size: int, *, prompt: Length, answer: Length, system: int = 24
) -> list[Tokens]:
    """Groups of answers to a prompt; all prompts begin with the same system prompt."""
    rows, start = [], drawn(rng, (system, system))
    for _ in range(count):
        asked = np.concatenate([start, drawn(rng, prompt)])
        rows += [np.concatenate([asked, drawn(rng, answer)]) for _ in range(size)]
    return rows


def continuations(rng: np.random.Generator, count: int, size: int, turns: Length) -> list[Tokens]:
    """Conversations whose past is kept or cut short from turn to turn: a row for each turn."""
    rows = []
    for _ in range(count):
        asked = drawn(rng, (150, 400))
        for _ in range(size):
            past = asked
            for _ in range(int(rng.integers(*turns, endpoint=True))):
                rows.append(np.concatenate([past, drawn(rng, (40, 250))]))
                kept = len(rows[-1]) if rng.random() < 0.7 else len(past)
                past = np.concatenate([rows[-1][:kept], drawn(rng, (20, 200))])
    return rows


def long_tailed(rng: np.random.Generator) -> list[Tokens]:
    """Short prompts with answers whose lengths are log-normal, as those of reasoning models."""
    rows = []
    for _ in range(64):
        asked = drawn(rng, (30, 100))
        for length in np.clip(rng.lognormal(7, 0.7, 8), 50, 8000).astype(int).tolist():
            rows.append(np.concatenate([asked, drawn(rng, (length, length))]))
    return rows


def families(rng: np.random.Generator) -> list[Tokens]:
    """Four kinds of scenario, each with long tool descriptions of its own."""
    kinds = [groups(rng, 16, 8, prompt=(100, 300), answer=(100, 500), system=1500) for _ in range(4)]
    return [row for kind in kinds for row in kind]


SHAPES = (
    Shape("short prompts, long answers", 8192, long_tailed),
    Shape("one huge shared prompt", 8192, lambda rng: groups(rng, 1, 256, prompt=(5000, 5000), answer=(100, 600))),
    Shape("long prompts", 8192, lambda rng: groups(rng, 48, 8, prompt=(1000, 3500), answer=(100, 800))),
    Shape("families of prompts", 8192, families),
    Shape("groups larger than a row", 8192, lambda rng: groups(rng, 6, 64, prompt=(200, 800), answer=(200, 900))),
    Shape("two answers fill a row", 8192, lambda rng: groups(rng, 32, 8, prompt=(300, 300), answer=(2500, 5000))),
    Shape("turns with continuations", 8192, lambda rng: continuations(rng, 40, 6, (1, 5))),
    Shape("random lengths", 8192, lambda rng: [drawn(rng, (50, 8000)) for _ in range(300)]),
    Shape("random short lengths", 8192, lambda rng: [drawn(rng, (50, 1500)) for _ in range(500)]),
    Shape("equal lengths", 8192, lambda rng: groups(rng, 32, 8, prompt=(250, 250), answer=(750, 750))),
    Shape("few rows", 4096, lambda rng: groups(rng, 5, 8, prompt=(300, 300), answer=(100, 900))),
    Shape("a row that holds the longest", 2100, lambda rng: groups(rng, 32, 8, prompt=(200, 300), answer=(200, 1770))),
    Shape("many rows", 32768, lambda rng: groups(rng, 256, 16, prompt=(200, 1500), answer=(100, 1500))),
)
