"""Who waits for news of a job. One event in the process wakes everybody who asks for the same job; nobody asks the
database again and again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field

# An ended job that nobody asks for any more is forgotten here, and read from the table when it is asked for again.
_MOST = 10_000


@dataclass
class _Feed:
    version: int = 0
    last: int | None = None
    over: bool = False
    owner: str | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class News:
    """What is known of the events of jobs without reading them: the last number of each, and whether more can come."""

    def __init__(self) -> None:
        self._feeds: OrderedDict[str, _Feed] = OrderedDict()

    def mark(self, job_id: str) -> int:
        """Where the telling of a job is now, for `learn` and `wait`: taken before its events are read."""
        return self._feed(job_id).version

    def owner(self, job_id: str) -> str | None:
        """The entity of a job, where it is known."""
        feed = self._feeds.get(job_id)
        return None if feed is None else feed.owner

    def owned_by(self, job_id: str, entity: str) -> None:
        """The entity of a job was read."""
        self._feed(job_id).owner = entity

    def nothing_after(self, job_id: str, number: int) -> bool:
        """Whether it is known that the job has no event behind this one."""
        last = self._feed(job_id).last
        return last is not None and number >= last

    def learn(self, job_id: str, last: int, *, mark: int) -> None:
        """All events up to `last` were read, and there was none behind it."""
        feed = self._feed(job_id)
        if feed.version == mark:
            feed.last = last

    def told(self, job_id: str, *, over: bool = False) -> None:
        """There is more of a job; `over`: and nothing will follow. Everybody who waits looks again."""
        feed = self._feed(job_id)
        feed.version += 1
        feed.last, feed.over = None, feed.over or over
        feed.changed.set()
        feed.changed = asyncio.Event()

    async def wait(self, job_id: str, *, mark: int, limit_s: float) -> bool:
        """Whether there is more since `mark`, within the limit; at once when nothing can follow."""
        feed = self._feed(job_id)
        if feed.version == mark and not feed.over:
            try:
                await asyncio.wait_for(feed.changed.wait(), limit_s)
            except TimeoutError:
                return False
        return feed.version != mark

    def _feed(self, job_id: str) -> _Feed:
        feed = self._feeds.get(job_id)
        if feed is None:
            feed = self._feeds[job_id] = _Feed()
            while len(self._feeds) > _MOST:
                self._feeds.popitem(last=False)
        self._feeds.move_to_end(job_id)
        return feed
