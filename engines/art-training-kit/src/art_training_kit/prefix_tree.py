"""Rows in sorted order, and the prefix tree that they are: a subtree is a span of neighbours.

Knows tokens only to sort them, then lengths and shared lengths; knows nothing of how packed rows are filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .rows import Ints

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """Rows in lexicographic order of their tokens.

    `permutation[i]` is the row at sorted position i, `lengths[i]` its length, `shared[i]` how many leading tokens it
    has in common with sorted position i - 1 (0 for the first).
    """

    permutation: Positions
    lengths: Positions
    shared: Positions

    def shared_with_previous(self, members: Positions) -> Positions:
        """The same as `shared` within a selection of ascending sorted positions.

        Two sorted rows share as much as the least that any neighbours between them share.
        """
        result = np.zeros(len(members), dtype=np.int64)
        if len(members) > 1:
            result[1:] = np.minimum.reduceat(self.shared[: members[-1] + 1], members[:-1] + 1)
        return result

    @property
    def tree_tokens(self) -> int:
        """Tokens of the whole step with every shared prefix once: no packing can need fewer."""
        return int((self.lengths - self.shared).sum())

    def least_tokens(self, capacity: int) -> int:
        """Tokens that no packing into rows of `capacity` can be below, as far as counting tells.

        What branches off after a prefix of d tokens needs (its own tokens) / (capacity - d) rows at least, and each of
        them holds the prefix.
        """
        branches = [[0, 0]]  # from the root down: tokens of the prefix, tokens after it
        for length, shared in zip(self.lengths.tolist(), [*self.shared[1:].tolist(), 0], strict=True):
            branches.append([length, 0])
            while branches[-1][0] > shared:
                depth, after = branches.pop()
                if branches[-1][0] < shared:
                    branches.append([shared, 0])
                rows = max(1, -(-after // max(1, capacity - depth)))
                branches[-1][1] += after + (depth - branches[-1][0]) * rows
        return branches[0][1]


def sort_rows(contexts: Sequence[Ints]) -> Order:
    """Sort rows of token ids, each at least one token long."""
    lengths = np.fromiter((len(c) for c in contexts), dtype=np.int64, count=len(contexts))
    flat = np.concatenate(contexts).astype(">u4").tobytes()
    ends = np.cumsum(lengths) * 4
    keys = [flat[end - 4 * length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]
    order = sorted(range(len(contexts)), key=keys.__getitem__)
    shared = np.zeros(len(contexts), dtype=np.int64)
    for position in range(1, len(order)):
        a, b = contexts[order[position - 1]], contexts[order[position]]
        n = min(len(a), len(b))
        differs = a[:n] != b[:n]
        first = int(differs.argmax())
        shared[position] = first if differs[first] else n
    permutation = np.asarray(order, dtype=np.int64)
    return Order(permutation, lengths[permutation], shared)


class Part(NamedTuple):
    """Rows that stay together: neighbours in sorted order that are a whole subtree (`span`), or several such parts.

    `size` is what they need as a packed row, the prefix from the root included. `depth` is how many tokens several
    parts begin with.
    """

    size: int
    span: tuple[int, int] = (0, 0)
    depth: int = 0
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True)
class Branching:
    """Rows that begin with the same `depth` tokens and are too many for one packed row.

    `parts` are those of its children that aren't; those that are have this one's index as their `parent` (-1: none).
    """

    parent: int
    depth: int
    parts: Sequence[Part]


class PrefixTree:
    """The prefix tree of sorted rows: a subtree is a span of them, and ends where neighbours share less."""

    def __init__(self, order: Order) -> None:
        self._lengths, self._shared = order.lengths, order.shared
        self._added_before = np.concatenate([[0], np.cumsum(order.lengths - order.shared)])

    def children(self, part: Part) -> tuple[int, Sequence[Part]]:
        """How many tokens the rows of a part begin with, and the smaller parts that it consists of; none for a row."""
        first, last = part.span
        if part.parts or last - first < 2:
            return part.depth, part.parts
        shared = self._shared[first + 1 : last]
        depth = int(shared.min())
        starts = np.append(first, np.flatnonzero(shared == depth) + first + 1)
        ends = np.append(starts[1:], last)
        sizes = self._lengths[starts] + self._added_before[ends] - self._added_before[starts + 1]
        spans = zip(starts.tolist(), ends.tolist(), strict=True)
        return depth, [Part(size, span) for size, span in zip(sizes.tolist(), spans, strict=True)]

    def larger_than(self, capacity: int) -> list[Branching]:
        """Every branching whose rows don't fit into one packed row, the parent before its children."""
        found: list[Branching] = []
        whole = Part(int(self._added_before[-1]), (0, len(self._lengths)))
        pending = [(-1, whole)] if whole.size > capacity else []
        while pending:
            parent, part = pending.pop()
            depth, children = self.children(part)
            pending += [(len(found), child) for child in children if child.size > capacity]
            found.append(Branching(parent, depth, [child for child in children if child.size <= capacity]))
        return found
