"""Keeps the keys and values of computed sequences, and finds the longest one that a new prompt starts with.

Everything is keyed by the adapter that computed it (its uid, never its name), because keys and values of one adapter
are wrong under another. Knows token ids and tensors, not requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

BLOCK: Final = 16
Tokens = NDArray[np.int32]


@dataclass(eq=False)
class CachedPrefix:
    """`tokens` computed under adapter `uid` (0: the base model), with their `kv` [layers, 2, tokens, kv_heads,
    head_dim].
    """

    uid: int
    tokens: Tokens
    kv: Tensor

    @property
    def size(self) -> int:
        """Bytes."""
        return self.kv.numel() * self.kv.element_size()


def block_hashes(uid: int, tokens: Tokens) -> list[int]:
    """One hash for each whole block's end, of everything up to there."""
    hashes, running = [], hash(("prefix", uid))
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        running = hash((running, tokens[start : start + BLOCK].tobytes()))
        hashes.append(running)
    return hashes


def common_length(a: Tokens, b: Tokens) -> int:
    """How many tokens two sequences have in common at their start."""
    shorter = min(len(a), len(b))
    differ = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differ[0]) if len(differ) else shorter


class PrefixCache:
    """Least-recently-used prefixes within `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._used = 0
        self._entries: OrderedDict[int, tuple[CachedPrefix, list[int]]] = OrderedDict()
        self._index: dict[int, CachedPrefix] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[CachedPrefix]:
        return (entry for entry, _ in self._entries.values())

    @property
    def used(self) -> int:
        """Bytes held."""
        return self._used

    def wants(self, uid: int, tokens: Tokens, size: int) -> bool:
        """Whether storing these `size` bytes would be of use: they fit and are not there already."""
        if size > self._budget or len(tokens) < BLOCK:
            return False
        found = self.find(uid, tokens, block_hashes(uid, tokens))
        return found is None or common_length(found.tokens, tokens) < len(tokens)

    def add(self, entry: CachedPrefix) -> None:
        """Stores an entry, and drops the least recently used ones that no longer fit."""
        if entry.size > self._budget or len(entry.tokens) < BLOCK:
            return
        hashes = block_hashes(entry.uid, entry.tokens)
        for shorter in {id(e): e for value in hashes if (e := self._index.get(value))}.values():
            if len(shorter.tokens) <= common_length(shorter.tokens, entry.tokens):
                self._drop(shorter)  # the new entry answers for all of it
        self._entries[id(entry)] = (entry, hashes)
        self._used += entry.size
        for value in hashes:
            self._index[value] = entry
        while self._used > self._budget:
            self._drop(next(iter(self._entries.values()))[0])

    def find(self, uid: int, tokens: Tokens, hashes: list[int]) -> CachedPrefix | None:
        """The entry with the longest common start, if it is at least a block."""
        for value in reversed(hashes):
            entry = self._index.get(value)
            # Hashes may collide: only equal tokens count.
            if entry is not None and entry.uid == uid and common_length(entry.tokens, tokens) >= BLOCK:
                self._entries.move_to_end(id(entry))
                return entry
        return None

    def forget(self, uid: int) -> None:
        """Drops everything computed under an adapter."""
        for entry in [entry for entry in self if entry.uid == uid]:
            self._drop(entry)

    def clear(self) -> None:
        """Drops everything."""
        self._entries.clear()
        self._index.clear()
        self._used = 0

    def _drop(self, entry: CachedPrefix) -> None:
        _, hashes = self._entries.pop(id(entry))
        self._used -= entry.size
        for value in hashes:
            if self._index.get(value) is entry:
                del self._index[value]
