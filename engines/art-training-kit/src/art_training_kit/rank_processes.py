"""The processes of a worker's further ranks: started by the first, given each job that it is given, gone when it is.

A rank that is lost can't be replaced within a job, so the first then ends itself, and whoever started it sees a worker
that died. The ranks meet by a file in a folder of theirs, not by a port: torchrun's listen on every interface, and what
comes in there is unpickled. Knows processes; knows no torch and no training.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, Protocol

from art_core.atomic_files import write_atomically
from art_engine_kit.training_wire import TrainEvent, TrainJob

_log = logging.getLogger(__name__)
_STOP_LIMIT_S = 5.0
_SEEN_GONE_S = 1.0
# The signals that ask a worker to leave. Its first rank ends the others.
_FOR_THE_FIRST: Final = (signal.SIGINT, signal.SIGTERM)


class Runner(Protocol):
    """What runs a job, as a trainer does."""

    def run(self, job: TrainJob, cancelled: Callable[[], bool]) -> Iterator[TrainEvent]:
        """Yield the job's events; raise when it fails."""


class Followers:
    """The ranks 1 to `count` - 1 of the worker that this process is the first of."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._ending = threading.Lock()
        self._stopping = False
        # The others inherit this, so that a signal to the whole group ends none of them: somebody has to be left to
        # remove the folder. To this process it comes afterwards.
        signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_FIRST)
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="art-ranks-"))
            self._processes = [
                # Each hears jobs by its standard input, which closes however this process ends.
                subprocess.Popen(
                    [*sys.orig_argv, "--rank", str(number), "--meeting", str(self.folder)],
                    stdin=subprocess.PIPE,
                    env=os.environ | own_devices(os.environ, number, count),
                )
                for number in range(1, count)
            ]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_FIRST)
        for process in self._processes:
            threading.Thread(target=self._watch, args=(process,), daemon=True).start()

    def leading(self, runner: Runner) -> Runner:
        """`runner`, for all ranks: each of its jobs goes to the others too."""
        return _Leading(self, runner)

    def tell(self, job: TrainJob) -> None:
        """Give the other ranks a job."""
        line = job.model_dump_json().encode() + b"\n"
        for number, process in enumerate(self._processes, start=1):
            assert process.stdin is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
            except OSError as error:
                self.lost(f"rank {number} of {self._count} takes no more jobs: {error}")

    def lost(self, why: str) -> NoReturn:
        """End this process and the other ranks at once: nothing half-made is kept of a job, whenever it ends."""
        with self._ending:
            if not self._stopping:
                reasons = self._ends() or [why]
                # First, since what the others have to say of this would be said after it.
                self._end(0.0)
                for reason in reasons:
                    _log.critical("%s. This worker ends; nothing of a job under way is kept", reason)
                os._exit(1)
        # The process is about to end anyhow, and politely.
        threading.Event().wait()
        raise AssertionError("nothing sets this event")

    def stop(self) -> None:
        """End the other ranks."""
        with self._ending:
            self._stopping = True
            self._end(_STOP_LIMIT_S)

    def _end(self, limit_s: float) -> None:
        for process in self._processes:
            assert process.stdin is not None
            # One that is gone has closed its end.
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self.lost("a rank ended")

    def _ends(self) -> list[str]:
        """How those ended that have, in their last words where they had any. Who loses a connection to one may see it
        before its process is gone.
        """
        deadline = time.monotonic() + _SEEN_GONE_S
        while all(each.poll() is None for each in self._processes) and time.monotonic() < deadline:
            time.sleep(0.02)
        ends = []
        for number, process in enumerate(self._processes, start=1):
            try:
                ends.append(_last_words(self.folder, number).read_text(encoding="utf-8"))
            except FileNotFoundError:
                code = process.poll()
                if code is not None:
                    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
                    ends.append(f"rank {number} of {self._count} (process {process.pid}) {how}")
        return ends


@dataclass(frozen=True)
class _Leading:
    followers: Followers
    runner: Runner

    def run(self, job: TrainJob, cancelled: Callable[[], bool]) -> Iterator[TrainEvent]:
        self.followers.tell(job)
        yield from self.runner.run(job, cancelled)


class Follower:
    """This process as a further rank, whose jobs come by its standard input. It ends when that does."""

    def __init__(self, number: int, folder: Path) -> None:
        self._number = number
        self._folder = folder
        self._first = os.getppid()
        self._heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        # In a thread, since a rank that computes or waits for the others must end as well.
        threading.Thread(target=self._hear, daemon=True).start()

    def jobs(self) -> Iterator[TrainJob]:
        """Each job as it comes; endless."""
        while True:
            yield TrainJob.model_validate_json(self._heard.get())

    def wait(self) -> NoReturn:
        """Do nothing until the first rank is gone."""
        while True:
            self._heard.get()

    def lost(self, why: str) -> NoReturn:
        """End this process, since another rank is gone or this one can't go on."""
        _log.critical("%s. It ends", why)
        if os.getppid() != self._first:
            self._leave(1)
        # What every rank then says of the connections that it lost is longer than the end of a log that anybody is
        # shown, so the first repeats this at the very end.
        with contextlib.suppress(OSError):
            write_atomically(_last_words(self._folder, self._number), why.partition("\n")[0].encode())
        os._exit(1)

    def _hear(self) -> None:
        for line in sys.stdin.buffer:
            self._heard.put(line)
        self._leave(0)

    def _leave(self, code: int) -> NoReturn:
        # The first rank may have had no time to.
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(code)


def _last_words(folder: Path, number: int) -> Path:
    return folder / f"last-words-{number}"


def own_devices(environment: Mapping[str, str], number: int, count: int) -> dict[str, str]:
    """What rank `number` of `count` has to find in its environment: the one GPU of those named there that is its own,
    which it then knows as the first; and its part of the cores, where nothing is said of them.
    """
    own = {}
    devices = [device for device in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    if devices:
        own["CUDA_VISIBLE_DEVICES"] = devices[number]
    if "OMP_NUM_THREADS" not in environment:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        own["OMP_NUM_THREADS"] = str(max(1, cores // count))
    if sys.platform == "linux":
        # Not the interface that the machine's name leads to.
        own |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return own
