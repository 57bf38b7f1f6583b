"""How many waiting tasks to wake in one round of the event loop.

When thousands of answers are there at once, all that is done with them would be done in one round, and nothing else on
the loop in the meantime. Knows only when the tasks that were woken began to run.
"""

from __future__ import annotations

# What the tasks woken in one round may take together. Whoever else waits on the loop waits for two or three rounds.
ROUND_S = 0.002
AT_FIRST = 8
# Two at least: what a task takes is known from when the next one begins.
FEWEST, MOST = 2, 64


class WakingPace:
    """Wakes as many tasks a round as take about `ROUND_S` seconds, by what those before them took."""

    def __init__(self) -> None:
        self._at_once = AT_FIRST
        self._woken = 0
        self._first_s = self._last_s = 0.0

    def woke(self, now_s: float) -> None:
        """A task that was woken begins to run."""
        if not self._woken:
            self._first_s = now_s
        self._last_s = now_s
        self._woken += 1

    def at_once(self) -> int:
        """How many to wake in this round; those of the round before have run."""
        if self._woken > 1:
            each_s = max(1e-6, (self._last_s - self._first_s) / (self._woken - 1))
            # One round may have been slow for reasons of its own.
            wanted = min(max(int(ROUND_S / each_s), self._at_once // 2), self._at_once * 2)
            self._at_once = min(max(wanted, FEWEST), MOST)
        self._woken = 0
        return self._at_once
