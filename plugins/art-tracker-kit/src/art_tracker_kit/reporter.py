"""A thread of its own for a tracker's library, with a bounded queue before it. Whoever reports is never kept waiting.

Knows runs, which it opens when something is first reported, and no library. It must not know what is reported.
"""

from __future__ import annotations

# A library that is first imported as the process ends, after a short script, could not import it any more.
import concurrent.futures.thread  # noqa: F401
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from .reported import LoggedModel

ROOM = 256
CLOSING_LIMIT_S = 60.0
AGAIN_AFTER_S = 30.0

_log = logging.getLogger(__name__)


class Run(Protocol):
    """What is reported to: one model's run in a tracker's library. All of it is called in the reporter's thread."""

    def close(self) -> None:
        """Send what is left, and let go of it."""


RunT = TypeVar("RunT", bound=Run)


class TrackerBehind(Exception):
    """A tracker's queue is full, and what it was to be told is not reported."""


@dataclass(frozen=True)
class _Task(Generic[RunT]):
    model: LoggedModel
    what: str
    send: Callable[[RunT], None]


@dataclass
class _Slot(Generic[RunT]):
    """One model's run, or since when it couldn't be opened."""

    run: RunT | None = None
    failed_at: float | None = None


class Reporter(Generic[RunT]):
    """Tells a library what happened, in order, in one thread.

    When the queue is full, because the library hangs or can't keep up, the new is refused and the old is kept: `tell`
    raises TrackerBehind, which `announce` makes a warning of. What fails in the thread is logged as a warning and what
    comes after is tried as before; a run that can't be opened is tried again, at most every `again_after_s`. At the
    process's end what is queued is sent, and runs are closed, for at most `closing_limit_s`; what is left then is
    counted in a warning.
    """

    def __init__(
        self,
        tracker: str,
        open_run: Callable[[LoggedModel], RunT],
        *,
        room: int = ROOM,
        closing_limit_s: float = CLOSING_LIMIT_S,
        again_after_s: float = AGAIN_AFTER_S,
    ) -> None:
        self.tracker = tracker
        self._open_run = open_run
        self.closing_limit_s = closing_limit_s
        self._again_after_s = again_after_s
        self._tasks: queue.Queue[_Task[RunT] | threading.Event] = queue.Queue(room)
        self._slots: dict[tuple[str | None, str, str], _Slot[RunT]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._given_up = threading.Event()
        self._refused = 0  # by the callers, under the lock
        self._failed = 0  # by the thread alone
        self._doing, self._since = "its start", time.monotonic()

    def tell(self, model: LoggedModel, what: str, send: Callable[[RunT], None]) -> None:
        """Have `send` called with the model's run, later. Returns at once.

        `what` names it in messages: "the metrics of step 3". Raises TrackerBehind when the queue is full.
        """
        with self._lock:
            if self._closing.is_set():
                raise TrackerBehind(f"{what} is not reported to {self.tracker}: it was closed, as this process ends.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"art-{self.tracker}", daemon=True)
                self._thread.start()
                threading.Thread(target=self._close_with_process, name=f"art-{self.tracker}-end").start()
            try:
                self._tasks.put_nowait(_Task(model, what, send))
            except queue.Full:
                self._refused += 1
                raise TrackerBehind(
                    f"{what} of {model.project}/{model.name} is not reported to {self.tracker}, which has been busy"
                    f" with {self._doing} for {time.monotonic() - self._since:.0f} s; {self._tasks.maxsize} more wait."
                    " Training goes on, and what tracker-files keeps is whole."
                ) from None

    def flush(self, limit_s: float = CLOSING_LIMIT_S) -> bool:
        """Wait until the library was told all that was reported so far; False when that takes longer than `limit_s`."""
        if self._thread is None:
            return True
        done = threading.Event()
        deadline = time.monotonic() + limit_s
        with contextlib.suppress(queue.Full):
            self._tasks.put(done, timeout=limit_s)
            return done.wait(max(0.0, deadline - time.monotonic()))
        return False

    def close(self) -> None:
        """Send what is queued, close the runs, and end the thread, within `closing_limit_s`. It tells nothing more."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
        if self._thread is None:
            return
        deadline = time.monotonic() + self.closing_limit_s
        with contextlib.suppress(queue.Full):
            self._tasks.put(threading.Event(), timeout=self.closing_limit_s)  # wakes it
        self._thread.join(max(0.0, deadline - time.monotonic()))
        lost, why = self._refused + self._failed, ""
        if self._thread.is_alive():
            self._given_up.set()
            lost += sum(isinstance(task, _Task) for task in list(self._tasks.queue))
            why = f", those included that waited while it was busy with {self._doing} to the end"
        if lost or why:
            _log.warning("%s: %d reports were lost while this process ran%s.", self.tracker, lost, why)

    def _work(self) -> None:
        while not self._given_up.is_set():
            task = self._tasks.get()
            if isinstance(task, threading.Event):
                task.set()
            else:
                self._do(task)
            if self._closing.is_set() and self._tasks.empty():
                break
        for (_, project, name), slot in self._slots.items():
            if slot.run is not None and not self._given_up.is_set():
                self._guarded(f"closing the run of {project}/{name}", slot.run.close)
        self._slots.clear()

    def _do(self, task: _Task[RunT]) -> None:
        model = task.model
        slot = self._slots.setdefault((model.entity, model.project, model.name), _Slot())
        if slot.run is None and not self._opened(slot, model):
            self._failed += 1
            return
        run = slot.run
        assert run is not None
        if not self._guarded(f"{task.what} of {model.project}/{model.name}", lambda: task.send(run)):
            self._failed += 1

    def _opened(self, slot: _Slot[RunT], model: LoggedModel) -> bool:
        if slot.failed_at is not None and time.monotonic() - slot.failed_at < self._again_after_s:
            return False

        def open_run() -> None:
            slot.run = self._open_run(model)

        opened = self._guarded(f"opening the run of {model.project}/{model.name}", open_run)
        slot.failed_at = None if opened else time.monotonic()
        return opened

    def _guarded(self, what: str, work: Callable[[], None]) -> bool:
        self._doing, self._since = what, time.monotonic()
        try:
            work()
        except BaseException as error:  # SystemExit too: a library must not end the thread of all other reports
            if not self._given_up.is_set():  # the process ends, and the library with it
                _log.warning("%s: %s failed: %s: %s", self.tracker, what, type(error).__name__, error)
            return False
        return True

    def _close_with_process(self) -> None:
        # Before any function of `atexit` is called, among which are the library's own, that take away what it works
        # with: the process waits for this thread, which is no daemon.
        threading.main_thread().join()
        self.close()
