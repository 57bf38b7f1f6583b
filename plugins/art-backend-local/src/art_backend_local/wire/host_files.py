"""Which host serves a path: `host.json` in the path, the lock beside it, and the per-user list of paths that had a
host.

Knows files and process ids. Talks to no host and starts none.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from uuid import uuid4

import platformdirs
import psutil
from filelock import FileLock, Timeout

from art_core.atomic_files import write_json_atomically

HOST_FILE = "host.json"
LOCK_FILE = "host.lock"
PATH_IN_USE = 75  # the exit status of a host that found the path taken
_START_TIME_SLACK_S = 2.0


@dataclass(frozen=True, kw_only=True)
class HostRecord:
    """What `host.json` says. `token` opens the control API; `started` and `owner_started` are in seconds since the
    epoch and make sure that a process id still means the same process. `owner_pid` is the client that a tethered host
    ends with, None for a host that outlives its clients.
    """

    pid: int
    started: float
    port: int
    version: str
    token: str = field(repr=False)
    owner_pid: int | None = None
    owner_started: float | None = None

    @property
    def alive(self) -> bool:
        """True while the process that wrote the record runs."""
        return process_lives(self.pid, self.started)

    @property
    def owner_alive(self) -> bool:
        """True while the client runs that a tethered host belongs to."""
        return self.owner_pid is not None and process_lives(self.owner_pid, self.owner_started)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"


def process_lives(pid: int, started: float | None) -> bool:
    """True when `pid` is the process that started at `started` and is not a zombie."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return started is None or abs(process.create_time() - started) < _START_TIME_SLACK_S
    except psutil.Error:
        return False


def start_time(pid: int) -> float:
    """When a running process started, in seconds since the epoch."""
    return psutil.Process(pid).create_time()


def read_host(path: Path) -> HostRecord | None:
    """The record of the path's host, or None when there is none or it is unreadable. The host may be dead by now."""
    try:
        return HostRecord(**json.loads((path / HOST_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def write_host(path: Path, record: HostRecord) -> None:
    """Write the record, readable by this user only from the first moment."""
    temporary = path / f".{HOST_FILE}.{uuid4().hex[:8]}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(record), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path / HOST_FILE)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_host(path: Path, pid: int) -> None:
    """Take the record away, if it is still the one of `pid`."""
    record = read_host(path)
    if record is not None and record.pid == pid:
        (path / HOST_FILE).unlink(missing_ok=True)


def lock_path(path: Path, *, patience_s: float = 0.0) -> FileLock | None:
    """Take the path for this process until it ends, or None when another process has it. The kernel frees it at any
    death.
    """
    lock = FileLock(path / LOCK_FILE, timeout=patience_s)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def path_is_locked(path: Path) -> bool:
    """True while some process holds the path."""
    if not (path / LOCK_FILE).exists():
        return False
    lock = lock_path(path)
    if lock is None:
        return True
    lock.release()
    return False


def remember_path(path: Path) -> None:
    """Add a path to the user's list, so that `art ps` finds its host from anywhere."""
    folder = _index()
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    write_json_atomically(folder / f"{name}.json", {"path": str(path)})


def known_hosts() -> list[tuple[Path, HostRecord]]:
    """The path and record of every host of this user that runs. Entries of those that don't are removed."""
    found = []
    for entry in sorted(_index().glob("*.json")):
        try:
            path = Path(json.loads(entry.read_bytes())["path"])
        except (OSError, ValueError, KeyError, TypeError):
            entry.unlink(missing_ok=True)
            continue
        record = read_host(path)
        if record is not None and record.alive:
            found.append((path, record))
        else:
            entry.unlink(missing_ok=True)
    return found


def _index() -> Path:
    return platformdirs.user_state_path("art") / "hosts"
