"""Lets Python's cyclic garbage collector do less while rollouts are gathered.

A sampled token with its logprob is several objects, and rollouts keep all of them, so at the default settings the
collector goes through everything gathered so far again and again: more than half of the client's time, in pauses of up
to seconds. Knows nothing of rollouts.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

# New containers before a pass over the youngest (a millisecond or two); the others are not gone through meanwhile.
RELAXED = (5_000, 1_000_000, 1_000_000)
# After so many passes over the youngest, ten million containers, the next gathering begins with a pass over all, so
# that what gatherings leave in cycles goes too. The trajectories of the step before are usually gone by then.
YOUNG_PASSES_BEFORE_A_FULL_ONE = 2_000

_gatherings = 0
_before = (0, 0, 0)
_passes_at_full_one = (0, 0)


@contextmanager
def fewer_collections() -> Generator[None]:
    """Raise the collector's thresholds in the block; the last block to end restores them.

    A collector that is switched off, or set by the user to run more seldom than this, stays as it is. Not for several
    threads at once, in which the thresholds of the first block may be restored early.
    """
    global _gatherings, _before
    if not _gatherings:
        _before = gc.get_threshold()
        if 0 < _before[0] < RELAXED[0]:
            gc.set_threshold(*RELAXED)
    if gc.get_threshold() == RELAXED:
        _collect_if_due()
    _gatherings += 1
    try:
        yield
    finally:
        _gatherings -= 1
        if not _gatherings and gc.get_threshold() == RELAXED:
            # Everything gathered counts as young, and the first pass at the old thresholds would go through all of it.
            # To freeze and unfreeze makes it old without a pass; what the user has frozen would be unfrozen with it.
            if not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()
            gc.set_threshold(*_before)


def _collect_if_due() -> None:
    global _passes_at_full_one
    young, _, full = (generation["collections"] for generation in gc.get_stats())
    if full != _passes_at_full_one[1]:
        _passes_at_full_one = (young, full)
    elif young - _passes_at_full_one[0] >= YOUNG_PASSES_BEFORE_A_FULL_ONE:
        gc.collect()
        _passes_at_full_one = (young, full + 1)
