"""Which token rows go into which packed row: whole subtrees of the step's prefix tree, split only where it pays.

Knows lengths and shared lengths only. From the deepest branching upwards, what doesn't fit into one packed row is
divided over as few as it needs, so that a long prefix is repeated as seldom as can be.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence

import numpy as np

from .prefix_tree import Branching, Order, Part, Positions, PrefixTree

# How many of the largest parts that fit are looked at to fill a gap, and how often a division is tried again.
_WINDOW = 24
_TRIES = 8
_EVEN_BELOW = 9
_EVEN_SLACKS = (1.02, 1.05, 1.1)


def assign_evenly(order: Order, capacity: int) -> list[Positions]:
    """As few rows as `assign_rows` finds, and when they are few, of much the same length.

    Each row may be an optimizer step; a short last one would be a step on little data.
    """
    rows = assign_rows(order, capacity)
    if 1 < len(rows) <= _EVEN_BELOW:
        tokens = sum(int((order.lengths[row] - order.shared_with_previous(row)).sum()) for row in rows)
        for slack in _EVEN_SLACKS:
            even = max(int(order.lengths.max()), int(tokens / len(rows) * slack))
            if even >= capacity:
                break
            evened = assign_rows(order, even)
            if len(evened) == len(rows):
                return evened
    return rows


def assign_rows(order: Order, capacity: int) -> list[Positions]:
    """Ascending sorted positions for each packed row, the shortest row last. Every row is at most `capacity` long."""
    tree = PrefixTree(order)
    branchings = tree.larger_than(capacity)
    if not branchings:
        return [np.arange(len(order.lengths))]
    rows = _divide_all(tree, branchings, capacity, loosen=False)
    if len(branchings) > 1:
        loosened = _divide_all(tree, branchings, capacity, loosen=True)
        rows = min(rows, loosened, key=lambda parts: (len(parts), sum(part.size for part in parts)))
    return [_positions(row) for row in sorted(rows, key=_size, reverse=True)]


def _divide_all(tree: PrefixTree, branchings: Sequence[Branching], capacity: int, *, loosen: bool) -> list[Part]:
    """Parts of at most `capacity` tokens that hold all rows, from the deepest branching upwards.

    A branching fills as many rows as it can; these and what is left over go on as parts to where it branches off. With
    `loosen` a row goes on in its pieces when those would repeat less than half of what it leaves empty: others may
    fill it better.
    """
    parts_of = [list(branching.parts) for branching in branchings]
    for index in range(len(branchings) - 1, 0, -1):
        branching, depth = branchings[index], branchings[index].depth
        above = parts_of[branching.parent]
        edge = depth - branchings[branching.parent].depth
        full = _tokens(parts_of[index], depth) // (capacity - depth)
        for pieces in _fill(tree, parts_of[index], depth, capacity, full)[0]:
            row = _together(depth, pieces)
            is_loose = loosen and 2 * edge * (len(pieces) - 1) < capacity - row.size
            above.extend(pieces if is_loose else [row])
    root = branchings[0].depth
    return [_together(root, pieces) for pieces in _divide(tree, parts_of[0], root, capacity)]


def _divide(tree: PrefixTree, parts: Sequence[Part], depth: int, capacity: int) -> list[list[Part]]:
    """Divide parts that begin with the same `depth` tokens over as few packed rows as is found.

    Where splitting them to fill the fewest rows thinkable leads to more than one beyond those, more rows are begun
    with: then less has to be split, and less is repeated.
    """
    fewest = -(-_tokens(parts, depth) // (capacity - depth))
    best, was_split = _fill(tree, parts, depth, capacity, fewest)
    for count in range(fewest + 1, fewest + 1 + _TRIES):
        if not was_split or len(best) <= max(fewest + 1, count - 1):
            break
        rows, was_split = _fill(tree, parts, depth, capacity, count)
        if len(rows) <= len(best):
            best = rows
    return best


def _fill(
    tree: PrefixTree, parts: Sequence[Part], depth: int, capacity: int, count: int
) -> tuple[list[list[Part]], bool]:
    """Fill `count` rows, each with the largest part left and those that fill it best, then place what is left over.

    What is left over goes where it fits most tightly; what fits nowhere is split, so that a piece of it fills the
    largest gap; what can't be split begins a row. Also tells whether anything was split.
    """
    queue = sorted(parts, key=_size)
    costs = [part.size - depth for part in queue]
    rows: list[list[Part]] = []
    gaps: list[tuple[int, int]] = []  # ascending, each with its row
    while queue and len(rows) < count:
        row, gap = [queue.pop()], capacity - depth - costs.pop()
        fitting = bisect_right(costs, gap)
        start = max(0, fitting - _WINDOW)
        for index in _best_sum(costs[start:fitting], gap):
            row.append(queue.pop(start + index))
            gap -= costs.pop(start + index)
        gaps.append((gap, len(rows)))
        rows.append(row)
    gaps.sort()
    was_split = False
    while queue:
        part = queue.pop()
        place = bisect_left(gaps, (part.size - depth, -1))
        if place == len(gaps):
            taken, rest = _split(tree, part, gaps[-1][0] + depth)
            if rest is not None:
                was_split = True
                part, place = taken, place - 1
                insort(queue, rest, key=_size)
            else:
                gaps.append((capacity - depth, len(rows)))
                rows.append([])
        gap, row_index = gaps.pop(place)
        rows[row_index].append(part)
        insort(gaps, (gap - (part.size - depth), row_index))
    return rows, was_split


def _split(tree: PrefixTree, part: Part, size: int) -> tuple[Part, Part | None]:
    """The most of a part that `size` tokens hold, and the rest; the part and None when they hold nothing of it."""
    depth, pieces = tree.children(part)
    taken = set(_best_sum([piece.size - depth for piece in pieces], size - depth))
    if not taken:
        return part, None
    return (
        _together(depth, [piece for index, piece in enumerate(pieces) if index in taken]),
        _together(depth, [piece for index, piece in enumerate(pieces) if index not in taken]),
    )


def _together(depth: int, parts: Sequence[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    return Part(depth + _tokens(parts, depth), depth=depth, parts=tuple(parts))


def _tokens(parts: Sequence[Part], depth: int) -> int:
    """How many tokens they have after the first `depth`, which they share."""
    return sum(part.size - depth for part in parts)


def _best_sum(numbers: Sequence[int], limit: int) -> list[int]:
    """Indices, descending, of the numbers whose sum comes nearest to `limit` from below.

    Bit s of `reached[i]` says that some of the first i numbers add up to s.
    """
    if limit <= 0 or not numbers:
        return []
    within = (1 << (limit + 1)) - 1
    reached = [1]
    for number in numbers:
        reached.append((reached[-1] | reached[-1] << number) & within)
        if reached[-1] >> limit:
            break
    total = reached[-1].bit_length() - 1
    chosen = []
    for index in range(len(reached) - 2, -1, -1):
        if not reached[index] >> total & 1:
            chosen.append(index)
            total -= numbers[index]
    return chosen


def _size(part: Part) -> int:
    return part.size


def _positions(part: Part) -> Positions:
    spans, left = [], [part]
    while left:
        part = left.pop()
        left.extend(part.parts)
        if not part.parts:
            spans.append(part.span)
    return np.concatenate([np.arange(first, last) for first, last in sorted(spans)])
