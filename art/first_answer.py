"""Says that a client's first request is still unanswered, since a server that loads, compiles or hangs says nothing.

Knows time and who is asked for what; knows neither how a request is sent nor when it is given up.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

SAY_AFTER_S = 10.0


class FirstAnswer:
    """Warns once when a client has been answered nothing for ten seconds; says no word after its first answer."""

    def __init__(self) -> None:
        self._settled = False

    @contextmanager
    def awaited(self, base_url: str, model: object, limit_s: float | None) -> Iterator[None]:
        """While it lasts, `model` is asked at this address, and given up after `limit_s` (None: never)."""
        if self._settled:
            yield
            return
        timer = asyncio.get_running_loop().call_later(SAY_AFTER_S, self._say, base_url, model, limit_s)
        try:
            yield
            self._settled = True
        finally:
            timer.cancel()

    def _say(self, base_url: str, model: object, limit_s: float | None) -> None:
        if self._settled:
            return
        self._settled = True
        patience = "and is waited for without a limit" if limit_s is None else f"and is given up after {limit_s:g} s"
        warnings.warn(
            f"{base_url} has not answered its first request, for model {model!r}, in {SAY_AFTER_S:g} s; the server may"
            f" be loading the model or compiling, or be busy. The request goes on, {patience}. The server's own log"
            " says what it does; under a LocalBackend's path it is in logs/.",
            RuntimeWarning,
            stacklevel=1,
        )
