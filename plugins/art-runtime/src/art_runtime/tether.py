"""Runs one program and ends its whole tree of processes when the owner is gone, however the owner ended.

    python -I -S tether.py OWNER_PID PIPE_FD STOP_TIMEOUT_S CORES PROGRAM [ARGUMENT...]

CORES are the numbers of those that the program keeps to, with commas between, or "all". Runs as a script of its own, so
it uses the standard library only and knows nothing of ART. The pipe's other end is held by the owner: when that closes,
or the owner's process is gone, or SIGTERM comes, the program's group gets SIGTERM and, after the timeout, everything
below this process SIGKILL. A second SIGTERM, or SIGQUIT, kills at once. It ends as the program ended: with its exit
code, or by its signal.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import sys
import time

_LEFTOVER_GRACE_S = 3.0
_KILL_LIMIT_S = 10.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD)
_LINUX = sys.platform == "linux"


def main(arguments: list[str]) -> None:
    """Run the program and leave only when nothing of it is left."""
    owner, pipe, timeout_s = int(arguments[0]), int(arguments[1]), float(arguments[2])
    cores, command = arguments[3], arguments[4:]
    os.set_inheritable(pipe, False)
    if cores != "all" and _LINUX:
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    tether = _Tether(owner, pipe, timeout_s)
    if os.getppid() == owner:
        tether.run(command)
    else:
        _say(f"its owner, process {owner}, was gone before it began")


class _Tether:
    def __init__(self, owner: int, pipe: int, timeout_s: float) -> None:
        self.owner, self.timeout_s = owner, timeout_s
        if _LINUX:
            # Orphaned grandchildren become our children, so that none can slip away to init.
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.wakeup, wakeup_in = os.pipe()
        for end in (self.wakeup, wakeup_in):
            os.set_blocking(end, False)
        for number in _WATCHED:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(wakeup_in, warn_on_full_buffer=False)
        # A child that the owner forked without exec holds the pipe too, so the owner's process is watched beside it.
        self.owner_ends = [pipe, *_process_descriptor(owner)]
        self.program = 0
        self.status: int | None = None
        self.deadline: float | None = None
        self.firm = False

    def run(self, command: list[str]) -> None:
        began, beginning = os.pipe()
        self.program = os.fork()
        if self.program == 0:
            _become(command)
        # Closed by exec: before that, the program has no group of its own that could be signalled.
        os.close(beginning)
        os.read(began, 1)
        os.close(began)
        while True:
            left = self._reap()
            if not left:
                break
            if self.status is not None and self.deadline is None:
                self._begin_end(f"the program ended and left processes behind: {_descendants()}")
            if self.deadline is not None and (self.firm or time.monotonic() >= self.deadline):
                self._kill()
                break
            self._wait()
        _end_as(self.status)

    def _wait(self) -> None:
        poller = select.poll()
        for descriptor in (self.wakeup, *(self.owner_ends if self.deadline is None else ())):
            poller.register(descriptor, select.POLLIN)
        limit = None if self.deadline is None else max(0.0, self.deadline - time.monotonic()) * 1000
        ready = {descriptor for descriptor, _ in poller.poll(limit)}
        signals = os.read(self.wakeup, 512) if self.wakeup in ready else b""
        asked = [number for number in signals if number != signal.SIGCHLD]
        if signal.SIGQUIT in asked or (asked and self.deadline is not None) or len(asked) > 1:
            self.firm = True
        if self.deadline is None and asked:
            self._begin_end(f"{signal.Signals(asked[0]).name} came")
        elif self.deadline is None and ready.intersection(self.owner_ends):
            self._begin_end(f"its owner, process {self.owner}, is gone")

    def _begin_end(self, reason: str) -> None:
        self.deadline = time.monotonic() + (self.timeout_s if self.status is None else _LEFTOVER_GRACE_S)
        _say(f"{reason}; ending process group {self.program}")
        if self.firm:
            return
        _signal_group(self.program, signal.SIGTERM)
        if self.status is not None:
            self._ask_leftovers()

    def _ask_leftovers(self) -> None:
        for pid in _descendants():
            _signal(pid, signal.SIGTERM)

    def _reap(self) -> bool:
        """Collect what has ended. False once nothing is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.program:
                self.status = status
                if self.deadline is not None:
                    # The program has left politely; what it leaves behind is asked itself, and has less time.
                    self.deadline = min(self.deadline, time.monotonic() + _LEFTOVER_GRACE_S)
                    self._ask_leftovers()

    def _kill(self) -> None:
        _say(f"killing what is left: {_descendants()}")
        give_up = time.monotonic() + _KILL_LIMIT_S
        while self._reap() and time.monotonic() < give_up:
            _signal_group(self.program, signal.SIGKILL)
            for pid in _descendants():
                _signal(pid, signal.SIGKILL)
            time.sleep(0.01)


def _become(command: list[str]) -> None:
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        if _LINUX:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.execv(command[0], command)
    except OSError as error:
        _say(f"{command[0]} cannot be run: {error}")
    finally:
        os._exit(127)


def _process_descriptor(pid: int) -> list[int]:
    try:
        return [os.pidfd_open(pid)]
    except (AttributeError, OSError):
        return []


def _descendants() -> list[int]:
    """Every process below this one that has not ended. Empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc") if _LINUX else ():
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        if state != b"Z":
            children.setdefault(int(parent), []).append(int(entry))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


def _end_as(status: int | None) -> None:
    if status is not None and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    sys.exit(0 if status is None else os.waitstatus_to_exitcode(status))


def _say(text: str) -> None:
    try:
        os.write(2, f"--- tether: {text}\n".encode())
    except OSError:
        return  # A full disk must not keep us from ending what we hold.


if __name__ == "__main__":
    main(sys.argv[1:])
