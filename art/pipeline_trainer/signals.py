"""What the first and the second SIGINT or SIGTERM do while a pipeline runs; the handlers before come back."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def on_signals(first: Callable[[], None], second: Callable[[], None], *, enabled: bool) -> Iterator[None]:
    """Call `first` at the first signal and `second` at each later one, on the running event loop.

    Only the main thread may handle signals; in any other this changes nothing.
    """
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, seen = asyncio.get_running_loop(), 0

    def handle() -> None:
        nonlocal seen
        seen += 1
        (first if seen == 1 else second)()

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        loop.add_signal_handler(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
