"""Starts processes: tethered to this one, so that they end when it ends in whatever way, or detached from it.

A tethered program runs under `tether.py`, which watches its owner and ends the whole tree of processes. Knows nothing
of what the programs do or when they are ready.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from art_core.errors import ProcessFailed
from art_engine_kit.process_environment import process_environment

_TETHER = Path(__file__).with_name("tether.py")
_KILL_MARGIN_S = 10.0
_detached: list[subprocess.Popen[bytes]] = []


class Child:
    """A process started by `spawn_tethered` or `spawn_detached`.

    `pid` is that of the tether, or of the program itself when detached; the program's processes are below it. For one
    owner thread at a time.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], *, tether: int | None, stop_timeout_s: float, log_file: Path | None
    ) -> None:
        self._process = process
        self._tether = tether
        self.pid = process.pid
        self.stop_timeout_s = stop_timeout_s
        self.log_file = log_file

    def __repr__(self) -> str:
        state = "running" if self.poll() is None else f"ended with {self.poll()}"
        return f"Child(pid={self.pid}, {'detached' if self._tether is None else 'tethered'}, {state})"

    def poll(self) -> int | None:
        """None while it runs, then its exit code; minus the signal's number when a signal ended it."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int:
        """Block until it has ended. Raises TimeoutError."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"process {self.pid} still runs after {timeout_s:g} s") from None

    def end(self) -> None:
        """Ask it to leave: SIGTERM to its group and, after `stop_timeout_s`, SIGKILL to the whole tree. Doesn't block.

        A detached process is only asked; nobody watches over it.
        """
        if self.poll() is not None:
            self.let_go()
        elif self._tether is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the whole tree at once. Doesn't block."""
        if self.poll() is not None:
            self.let_go()
        elif self._tether is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGQUIT)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def stop(self) -> int:
        """End it politely, then firmly, and give its exit code. Blocks for `stop_timeout_s` and a little at most."""
        self.end()
        try:
            code = self.wait(self.stop_timeout_s + _KILL_MARGIN_S)
        except TimeoutError:
            self.kill()
            code = self.wait(_KILL_MARGIN_S)
        self.let_go()
        return code

    def let_go(self) -> None:
        """Close the pipe to the tether, which ends the program if it still runs. A second call does nothing."""
        if self._tether is not None and self._tether >= 0:
            os.close(self._tether)
            self._tether = -1


def spawn_tethered(
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    log_file: Path | None = None,
    cwd: Path | None = None,
    stop_timeout_s: float = 20.0,
    cores: Sequence[int] = (),
) -> Child:
    """Start a program that ends when this process ends in whatever way, SIGKILL included, with all its descendants.

    `env` is added to `process_environment`. The program keeps to the CPU `cores` of these numbers, or to none in
    particular. Output is appended to `log_file` (None: thrown away). When the owner
    is gone, the program's group gets SIGTERM and, after `stop_timeout_s` seconds, every process of the tree SIGKILL.
    Raises ProcessFailed when the program does not exist.
    """
    program = _program(argv, env, cwd)
    read_end, write_end = os.pipe()
    # Isolated and without site, from its file: up in tens of milliseconds, whatever is installed or set.
    tether = [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid()), str(read_end), str(stop_timeout_s)]
    tether.append(",".join(map(str, cores)) or "all")
    try:
        process = _popen(tether, [program, *argv[1:]], env, log_file, cwd, keep=(read_end,))
    except BaseException:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)
    return Child(process, tether=write_end, stop_timeout_s=stop_timeout_s, log_file=log_file)


def spawn_detached(
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    log_file: Path | None = None,
    cwd: Path | None = None,
    stop_timeout_s: float = 20.0,
) -> Child:
    """Start a program in a session of its own that outlives this process. Arguments as for `spawn_tethered`."""
    program = _program(argv, env, cwd)
    process = _popen([], [program, *argv[1:]], env, log_file, cwd, keep=())
    # Kept, so that one that ends before us is reaped and not warned of as forgotten.
    _detached[:] = [known for known in _detached if known.poll() is None]
    _detached.append(process)
    return Child(process, tether=None, stop_timeout_s=stop_timeout_s, log_file=log_file)


def last_lines(log_file: Path | None, *, count: int = 20, secrets: Sequence[str] = ()) -> str:
    """The end of a log, with secret values blotted out; a sentence in its place when there is none."""
    if log_file is None:
        return "(no log is kept)"
    try:
        with log_file.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 64_000))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"(the log {log_file} cannot be read: {error})"
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return "\n".join(text.rstrip().splitlines()[-count:]) or "(the log is empty)"


def _program(argv: Sequence[str], env: Mapping[str, str] | None, cwd: Path | None) -> str:
    if not argv:
        raise ValueError("argv is empty: there is no program to start")
    path = (env or {}).get("PATH", os.environ.get("PATH"))
    found = shutil.which(argv[0], path=path)
    if found is None:
        raise ProcessFailed(f"{argv[0]!r} cannot be started: there is no such program. Is its environment installed?")
    if cwd is not None and not cwd.is_dir():
        raise ProcessFailed(f"{argv[0]!r} cannot be started in {cwd}: there is no such folder.")
    return os.path.abspath(found)


def _popen(
    tether: list[str],
    command: list[str],
    env: Mapping[str, str] | None,
    log_file: Path | None,
    cwd: Path | None,
    *,
    keep: tuple[int, ...],
) -> subprocess.Popen[bytes]:
    output = _open_log(log_file, command[0]) if log_file is not None else subprocess.DEVNULL
    try:
        if output >= 0:
            os.write(output, _first_line(command))
        return subprocess.Popen(
            [*tether, *command],
            env=process_environment(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output >= 0 else subprocess.DEVNULL,
            cwd=cwd,
            pass_fds=keep,
            start_new_session=True,
        )
    except OSError as error:
        hint = ""
        if error.errno in (errno.EAGAIN, errno.ENOMEM):
            hint = (
                " This user may have no more processes, or there is no memory for one: see ulimit -u, and art doctor."
            )
        raise ProcessFailed(f"{command[0]!r} cannot be started: {error}.{hint}") from error
    finally:
        if output >= 0:
            os.close(output)


def _open_log(file: Path, program: str) -> int:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise ProcessFailed(f"{program!r} cannot be started: its log at {file} cannot be written: {error}.") from error


def _first_line(command: list[str]) -> bytes:
    line = f"--- {time.strftime('%Y-%m-%dT%H:%M:%S%z')} starting {shlex.join(command)}\n"
    # A path may hold bytes that are no text.
    return line.encode("utf-8", "surrogateescape")
