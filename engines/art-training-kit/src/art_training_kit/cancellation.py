"""How a job is stopped whose client went away. Knows neither jobs nor clients."""

from __future__ import annotations

from collections.abc import Callable


class JobCancelled(Exception):
    """The job's client went away. Nothing was saved."""


def stop_if(cancelled: Callable[[], bool]) -> None:
    """Raise JobCancelled where the client is gone."""
    if cancelled():
        raise JobCancelled("the client went away, so the job was stopped between two rows; nothing was saved")
