"""How late the running event loop is: what a task that sleeps for 5 ms finds when it wakes up. Knows nothing else."""

from __future__ import annotations

import asyncio
import time

HEARTBEAT_S = 0.005


class Heartbeat:
    """Lags of the running event loop, in seconds: (when, by `time.monotonic`; lag; the part of it in which this thread
    had the processor).
    """

    def __init__(self) -> None:
        self.beats: list[tuple[float, float, float]] = []

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            asked, worked = time.monotonic(), time.thread_time()
            await asyncio.sleep(HEARTBEAT_S)
            now, own = time.monotonic(), time.thread_time() - worked
            self.beats.append((now, now - asked - HEARTBEAT_S, max(0.0, own - HEARTBEAT_S)))
