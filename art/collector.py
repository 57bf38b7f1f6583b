"""Lets Python's cyclic garbage collector run less often while rollouts are gathered.

A sampled token with its logprob is several objects, and rollouts keep all of them, so at the default settings the
collector goes through everything gathered so far again and again: more than half of the client's time, in pauses of up
to seconds. Knows nothing of rollouts.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

# New containers before a pass over the youngest (a millisecond or two), then such passes before one over all others.
# The old are gone through about every five million containers, so that what a long gathering leaves in cycles goes too.
RELAXED = (5_000, 1_000, 1)

_gatherings = 0
_before = (0, 0, 0)


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
    _gatherings += 1
    try:
        yield
    finally:
        _gatherings -= 1
        if not _gatherings and gc.get_threshold() == RELAXED:
            gc.set_threshold(*_before)
