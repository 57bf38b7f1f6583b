"""Which token rows go into which packed row: sort them so that shared prefixes are neighbours, then fill row after row.

Knows lengths and shared lengths only. A packed row takes neighbours in sorted order, since each then costs only what it
adds; the gap at its end is filled with later neighbours that fit, chosen so that little of a prefix has to be repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .rows import Ints

_FULL_ENOUGH = 0.01
_WINDOW = 512
_EVEN_BELOW = 9
_EVEN_SLACK = 1.1


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """Rows in lexicographic order of their tokens.

    `permutation[i]` is the row at sorted position i, `lengths[i]` its length, `shared[i]` how many leading tokens it
    has in common with sorted position i - 1 (0 for the first).
    """

    permutation: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    shared: npt.NDArray[np.int64]

    def shared_with_previous(self, members: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The same as `shared` within a selection of ascending sorted positions.

        Two sorted rows share as much as the least that any neighbours between them share.
        """
        result = self.shared[members]
        for k in np.flatnonzero(np.diff(members) > 1) + 1:
            result[k] = self.shared[members[k - 1] + 1 : members[k] + 1].min()
        result[0] = 0
        return result

    @property
    def tree_tokens(self) -> int:
        """Tokens of the whole step with every shared prefix once: no packing can need fewer."""
        return int((self.lengths - self.shared).sum())


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


def assign_evenly(order: Order, capacity: int) -> list[npt.NDArray[np.int64]]:
    """As few rows as `assign_rows` finds, and when they are few, of much the same length.

    Each row may be an optimizer step; a short last one would be a step on little data.
    """
    rows = assign_rows(order, capacity)
    if not 1 < len(rows) <= _EVEN_BELOW:
        return rows
    even = max(int(order.lengths.max()), int(order.tree_tokens / len(rows) * _EVEN_SLACK))
    if even >= capacity:
        return rows
    evened = assign_rows(order, even)
    return evened if len(evened) == len(rows) else rows


def assign_rows(order: Order, capacity: int) -> list[npt.NDArray[np.int64]]:
    """Ascending sorted positions for each packed row. Every row is at most `capacity` tokens long."""
    left = np.arange(len(order.lengths), dtype=np.int64)
    result: list[npt.NDArray[np.int64]] = []
    while len(left):
        shared = order.shared_with_previous(left)
        taken = _fill(order.lengths[left], shared, capacity)
        result.append(left[taken])
        keep = np.ones(len(left), dtype=bool)
        keep[taken] = False
        left = left[keep]
    return result


def _fill(lengths: npt.NDArray[np.int64], shared: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
    """Choose from the rows that are left, by index, for one packed row; the first is always in it."""
    costs = lengths - shared
    count = max(1, int(np.searchsorted(np.cumsum(costs), capacity, side="right")))
    taken = [np.arange(count)]
    gap = capacity - int(costs[:count].sum())
    end = count
    while gap > capacity * _FULL_ENOUGH and end < len(lengths):
        last = min(end + _WINDOW, len(lengths))
        # What a row shares with the last one taken shrinks with every neighbour that is passed over.
        common = np.minimum.accumulate(shared[end:last])
        first_cost = lengths[end:last] - common
        fits = np.flatnonzero(first_cost <= gap)
        if not len(fits):
            break
        total = np.cumsum(costs[end:last])
        room = gap - first_cost[fits] + total[fits]
        run_end = np.searchsorted(total, room, side="right")
        filled = first_cost[fits] + total[run_end - 1] - total[fits]
        # What the run shares with the neighbours it is taken from will be needed again in their row.
        after = np.append(shared[end:last], 0)[run_end]
        repeated = np.maximum(shared[end:last][fits], after) - common[fits]
        best = int(np.argmax(filled - repeated))
        if filled[best] <= repeated[best] and gap < capacity // 4:
            best = int(np.argmax(filled))
        start = end + int(fits[best])
        stop = end + int(run_end[best])
        taken.append(np.arange(start, stop))
        gap -= int(filled[best])
        end = stop
    return np.concatenate(taken)
