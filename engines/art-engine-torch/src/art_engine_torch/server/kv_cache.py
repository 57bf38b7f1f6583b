"""Where the keys and values of running sequences live: lanes of rows, one lane for each class of length.

A lane's running rows are always its first ones, so that attention over a lane is one call on a slice, without a copy.
Knows rows and lengths; what a sequence is, and whose adapter made it, it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Protocol

import torch
from torch import Tensor

from .decoder import DecodeRows, DecoderShape

SMALLEST_LANE: Final = 256
FIRST_ROWS: Final = 8
# Attention kernels want lengths that divide by this.
ALIGNMENT: Final = 16


class Occupant(Protocol):
    """What sits in a row: something with a number of tokens whose keys and values are stored."""

    computed: int


@dataclass(eq=False)
class Lane:
    """Rows of one capacity. `kv` is [layers, 2, rows, capacity, kv_heads, head_dim]; row i is `occupants[i]`'s."""

    capacity: int
    kv: Tensor
    occupants: list[Occupant] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many rows there is memory for."""
        return self.kv.shape[2]


class KVCache:
    """All lanes together, within `budget_tokens` (rows times capacity, summed). Raises ValueError if one sequence of
    `max_len` tokens would not fit."""

    def __init__(
        self, shape: DecoderShape, device: torch.device, dtype: torch.dtype, max_len: int, budget_tokens: int
    ) -> None:
        self._shape, self._device, self._dtype = shape, device, dtype
        self._capacities = _capacities(max_len)
        self._budget = budget_tokens
        if budget_tokens < self._capacities[-1]:
            raise ValueError(
                f"The key-value cache may hold {budget_tokens} tokens, fewer than one sequence of {max_len}: "
                "give it more memory (--kv-cache-gb) or serve shorter contexts (--max-model-len)."
            )
        self._lanes: dict[int, Lane] = {}
        self._lane_of: dict[int, Lane] = {}

    def __contains__(self, occupant: Occupant) -> bool:
        return id(occupant) in self._lane_of

    @property
    def occupied(self) -> int:
        """How many rows are taken."""
        return len(self._lane_of)

    @property
    def allocated_tokens(self) -> int:
        """Rows times capacity, summed over the lanes."""
        return sum(lane.rows * lane.capacity for lane in self._lanes.values())

    def insert(self, occupant: Occupant, kv: Tensor) -> bool:
        """Gives `occupant` a row; its `computed` first tokens come from `kv` [layers, 2, tokens, heads, dim].

        The row has room for at least one token more. False when there is no memory for it now.
        """
        lane = self._lane_with_room(occupant.computed + 1)
        if lane is None:
            return False
        row = len(lane.occupants)
        lane.kv[:, :, row, : occupant.computed] = kv[:, :, : occupant.computed]
        lane.occupants.append(occupant)
        self._lane_of[id(occupant)] = lane
        return True

    def remove(self, occupant: Occupant, *, clear: bool = False) -> None:
        """Gives the row back. `clear` overwrites it: what is not finite there would spread through masked attention."""
        self._vacate(self._lane_of.pop(id(occupant)), occupant, clear=clear)

    def _vacate(self, lane: Lane, occupant: Occupant, *, clear: bool) -> None:
        row, last = lane.occupants.index(occupant), len(lane.occupants) - 1
        if clear:
            lane.kv[:, :, row].zero_()
        if row != last:
            moved = lane.occupants[last]
            lane.kv[:, :, row, : moved.computed] = lane.kv[:, :, last, : moved.computed]
            lane.occupants[row] = moved
            if clear:  # the moved one may be about to be cleared too
                lane.kv[:, :, last].zero_()
        lane.occupants.pop()

    def occupants(self) -> list[Occupant]:
        """All of them, in the order in which they came."""
        places = {id(o): o for lane in self._lanes.values() for o in lane.occupants}
        return [places[key] for key in self._lane_of]

    def view(self, occupant: Occupant) -> Tensor:
        """Its keys and values, [layers, 2, computed, heads, dim]; valid until the next change of the cache."""
        lane = self._lane_of[id(occupant)]
        return lane.kv[:, :, lane.occupants.index(occupant), : occupant.computed]

    def outgrown(self) -> list[Occupant]:
        """Those whose next token has no room in their lane."""
        return [o for lane in self._lanes.values() for o in lane.occupants if o.computed >= lane.capacity]

    def promote(self, occupant: Occupant) -> bool:
        """Moves an occupant to a lane with room for its next token. False when there is no memory for it now."""
        target = self._lane_with_room(occupant.computed + 1)
        if target is None:
            return False
        kv = self.view(occupant)
        row = len(target.occupants)
        target.kv[:, :, row, : occupant.computed] = kv
        self._vacate(self._lane_of[id(occupant)], occupant, clear=False)
        target.occupants.append(occupant)
        self._lane_of[id(occupant)] = target  # an existing key keeps its place in the order
        return True

    def plan(self) -> tuple[list[DecodeRows], list[Occupant]]:
        """One decode step of every occupant: the plan of the lanes, and the occupants in the batch's order."""
        rows: list[DecodeRows] = []
        order: list[Occupant] = []
        grouped = self._shape.heads // self._shape.kv_heads
        for lane in self._lanes.values():
            count = len(lane.occupants)
            if not count:
                continue
            lengths = torch.tensor([o.computed for o in lane.occupants], device=self._device)
            longest = max(o.computed for o in lane.occupants) + 1
            length = min(-(-longest // ALIGNMENT) * ALIGNMENT, lane.capacity)
            hidden = torch.arange(length, device=self._device)[None] > lengths[:, None]
            mask = torch.zeros(count, 1, 1, length, device=self._device, dtype=self._dtype)
            mask.masked_fill_(hidden[:, None, None], float("-inf"))
            slots = torch.arange(count, device=self._device) * lane.capacity + lengths
            rows.append(DecodeRows(lane.kv, len(order), count, length, slots, mask.expand(-1, -1, grouped, -1)))
            order += lane.occupants
        return rows, order

    def trim(self) -> None:
        """Gives back the memory of rows nobody uses."""
        for capacity, lane in list(self._lanes.items()):
            if not lane.occupants:
                del self._lanes[capacity]
            elif lane.rows > len(lane.occupants):
                lane.kv = lane.kv[:, :, : len(lane.occupants)].clone()

    def _lane_with_room(self, length: int) -> Lane | None:
        capacity = next(c for c in self._capacities if c >= length)
        lane = self._lanes.get(capacity)
        if lane is not None and len(lane.occupants) < lane.rows:
            return lane
        for attempt in ("as it is", "trimmed"):
            if attempt == "trimmed":
                self.trim()
                lane = self._lanes.get(capacity)
            free = (self._budget - self.allocated_tokens) // capacity
            if lane is None and free > 0:
                self._lanes[capacity] = Lane(capacity, self._zeros(min(FIRST_ROWS, free), capacity))
                self._lanes = dict(sorted(self._lanes.items()))
                return self._lanes[capacity]
            if lane is not None and free > 0:
                grown = self._zeros(min(2 * lane.rows, lane.rows + free), capacity)
                for layer in range(self._shape.layers):
                    grown[layer, :, : lane.rows] = lane.kv[layer]
                lane.kv = grown
                return lane
        return None

    def _zeros(self, rows: int, capacity: int) -> Tensor:
        # Zeroed, because attention multiplies masked places by zero: what lies there must be finite.
        size = (self._shape.layers, 2, rows, capacity, self._shape.kv_heads, self._shape.head_dim)
        return torch.zeros(size, device=self._device, dtype=self._dtype)


def _capacities(max_len: int) -> list[int]:
    longest = -(-max_len // ALIGNMENT) * ALIGNMENT
    capacities = []
    size = SMALLEST_LANE
    while size < longest:
        capacities.append(size)
        size *= 2
    return [*capacities, longest]
