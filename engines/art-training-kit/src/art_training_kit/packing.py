"""Lay token rows out as prefix trees, so that a prefix which several rows share is computed once.

The rows of a step are sorted; what each adds to the row before it is a piece. Pieces in sorted order are a
depth-first walk of the step's prefix tree, so the tokens that may see a given token (its descendants) are one
contiguous range right after it. Everything a policy needs follows from that: `tree_end` for a mask, or blocks for
exact attention without one. Plain numpy over whole pieces; knows no model and no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .prefix_tree import Order, sort_rows
from .row_assignment import assign_evenly
from .rows import Floats, Ints, TokenRow


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """One forest of token sequences, as one row of tokens. All positions are positions in this row.

    Tokens, shape [S]: `token_ids`; `position_ids`, the depth of each in its tree; `tree_end`: token q sees token k
    exactly when k <= q < tree_end[k]. The same as blocks: `causal_blocks` [pieces, 2] are ranges (start, end) that
    see themselves causally; `cross_blocks` [blocks, 4] are (q_start, q_end, k_start, k_end), every q seeing every k.
    Predictions: `parents` [U] are the positions whose next-token distribution is needed, ascending; prediction t is
    the token `targets[t]` after position `parents[target_parent[t]]`, both of shape [T], each (position, token) once.
    Entries, shape [E], one for each sampled token of each sequence: `entry_target` (index of its prediction),
    `entry_sequence` (its sequence within this row, from 0), `entry_trajectory` (index in the step) and
    `old_logprobs`. `sequences` says which rows of the step are in this one.
    """

    token_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    tree_end: Ints
    causal_blocks: Ints
    cross_blocks: Ints
    parents: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    target_parent: npt.NDArray[np.int64]
    entry_target: npt.NDArray[np.int64]
    entry_sequence: npt.NDArray[np.int64]
    entry_trajectory: npt.NDArray[np.int64]
    old_logprobs: Floats
    sequences: Ints

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        """How many token rows this packed row holds."""
        return len(self.sequences)


def pack_rows(rows: Sequence[TokenRow], capacity: int) -> list[PackedRow]:
    """Pack a step's rows into as few packed rows of at most `capacity` tokens as a good fit finds.

    What follows a row's last sampled token, that token included, is never an input and is left out. A tree larger
    than `capacity` is split and the prefix that both parts need is repeated. Raises ValueError for a row without a
    sampled token or longer than `capacity`: dropping one is the caller's decision, never made here.
    """
    if not rows:
        return []
    for index, row in enumerate(rows):
        if not len(row.trained) or row.trained[0] < 1:
            raise ValueError(f"row {index} has no sampled token with a token before it")
    contexts = [row.token_ids[: row.trained[-1]] for row in rows]
    longest = max(map(len, contexts))
    if longest > capacity:
        raise ValueError(f"a row needs {longest} tokens and packed rows have {capacity}")
    order = sort_rows(contexts)
    return [_lay_out(rows, contexts, order, members) for members in assign_evenly(order, capacity)]


def _lay_out(
    rows: Sequence[TokenRow], contexts: Sequence[Ints], order: Order, members: npt.NDArray[np.int64]
) -> PackedRow:
    """`members` are ascending positions in the sorted order."""
    indices = order.permutation[members]
    lengths = order.lengths[members]
    shared = order.shared_with_previous(members)
    sizes = lengths - shared
    ends = np.cumsum(sizes)
    starts = ends - sizes
    total = int(ends[-1])

    tree_end = np.empty(total, dtype=np.int32)
    causal: list[tuple[int, int]] = []
    cross: list[tuple[int, int, int, int]] = []
    # The path from the root to the piece at hand, as spans (depth, position, end of its piece).
    depths: list[int] = []
    positions: list[int] = []
    piece_ends: list[int] = []
    shifts: list[int] = []
    counts: list[int] = []

    def close(depth_from: int, depth_to: int, span: int, at: int) -> None:
        start = positions[span] + depth_from - depths[span]
        end = start + depth_to - depth_from
        tree_end[start:end] = at
        if at > piece_ends[span]:
            cross.append((piece_ends[span], at, start, end))

    path_end = 0
    for index, depth, length, start, end in zip(
        indices.tolist(), shared.tolist(), lengths.tolist(), starts.tolist(), ends.tolist(), strict=True
    ):
        while depths and depths[-1] >= depth:
            close(depths[-1], path_end, len(depths) - 1, start)
            path_end = depths[-1]
            depths.pop()
            positions.pop()
            piece_ends.pop()
        if depths and path_end > depth:
            close(depth, path_end, len(depths) - 1, start)
        if length > depth:
            depths.append(depth)
            positions.append(start)
            piece_ends.append(end)
            causal.append((start, end))
        path_end = length
        # A prediction is made at the token before the sampled one.
        trained = rows[index].trained
        if len(depths) == 1:
            shifts.append(positions[0])
            counts.append(len(trained))
        else:
            cuts = trained.searchsorted(np.array([depth + 1 for depth in depths[1:]], dtype=np.int32)).tolist()
            shifts.extend(p - d for p, d in zip(positions, depths, strict=True))
            counts.extend(end - start for start, end in pairwise([0, *cuts, len(trained)]))
    while depths:
        close(depths[-1], path_end, len(depths) - 1, total)
        path_end = depths[-1]
        depths.pop()

    members_trained = [rows[index].trained for index in indices.tolist()]
    trained = np.concatenate(members_trained)
    per_member = np.fromiter((len(t) for t in members_trained), dtype=np.int64, count=len(members_trained))
    parent_of_entry = trained - 1 + np.repeat(np.asarray(shifts, dtype=np.int64), counts)
    token_of_entry = np.concatenate(
        [rows[i].token_ids[t] for i, t in zip(indices.tolist(), members_trained, strict=True)]
    )
    parents, targets, target_parent, entry_target = _predictions(
        parent_of_entry, token_of_entry.astype(np.int64), total
    )
    trajectories = np.fromiter((rows[i].trajectory for i in indices.tolist()), dtype=np.int64, count=len(indices))
    return PackedRow(
        token_ids=np.concatenate(
            [contexts[i][d:] for i, d in zip(indices.tolist(), shared.tolist(), strict=True)]
        ).astype(np.int64),
        position_ids=np.arange(total, dtype=np.int64) - np.repeat(starts - shared, sizes),
        tree_end=tree_end,
        causal_blocks=np.asarray(causal, dtype=np.int32).reshape(-1, 2),
        cross_blocks=np.asarray(cross, dtype=np.int32).reshape(-1, 4),
        parents=parents,
        targets=targets,
        target_parent=target_parent,
        entry_target=entry_target,
        entry_sequence=np.repeat(np.arange(len(indices)), per_member),
        entry_trajectory=np.repeat(trajectories, per_member),
        old_logprobs=np.concatenate([rows[i].old_logprobs for i in indices.tolist()]),
        sequences=indices.astype(np.int32),
    )


def _predictions(
    parent_of_entry: npt.NDArray[np.int64], token_of_entry: npt.NDArray[np.int64], total: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each (parent, token) once: returns parents, targets, target_parent and the prediction of each entry."""
    entries_at = np.bincount(parent_of_entry, minlength=total)
    parents = np.flatnonzero(entries_at)
    index_of = np.empty(total, dtype=np.int64)
    index_of[parents] = np.arange(len(parents))
    compact = index_of[parent_of_entry]
    # Only where branches leave from one position can two entries meet, and those are few.
    alone = entries_at[parent_of_entry] == 1
    crowd = np.flatnonzero(~alone)
    keys, crowd_target = np.unique((compact[crowd] << 32) | token_of_entry[crowd], return_inverse=True)
    single = np.flatnonzero(alone)
    entry_target = np.empty(len(parent_of_entry), dtype=np.int64)
    entry_target[single] = np.arange(len(single))
    entry_target[crowd] = len(single) + crowd_target
    targets = np.concatenate([token_of_entry[single], keys & 0xFFFFFFFF])
    target_parent = np.concatenate([compact[single], keys >> 32])
    return parents, targets, target_parent, entry_target
