"""Which host serves a path: `host.json` in the path, the lock beside it, and the user's own list of running hosts.

Knows files and process ids. Talks to no host and starts none.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from art_engine_kit.live_folders import entries_in
from art_engine_kit.user_folders import state_dir
from art_runtime.process_identity import process_lives

HOST_FILE = "host.json"
LOCK_FILE = "host.lock"
PATH_IN_USE = 75  # the exit status of a host that found the path taken


@dataclass(frozen=True, kw_only=True)
class HostRecord:
    """What `host.json` says. `path` is what the host serves, `token` opens the control API; `identity` and
    `owner_identity` make sure that a process id still means the same process (see `art_runtime.process_identity`).
    `owner_pid` is the client that a tethered host ends with, None for a host that outlives its clients.
    """

    path: str
    pid: int
    identity: str
    port: int
    version: str
    token: str = field(repr=False)
    owner_pid: int | None = None
    owner_identity: str | None = None

    @property
    def alive(self) -> bool:
        """True while the process that wrote the record runs."""
        return process_lives(self.pid, self.identity)

    @property
    def owner_alive(self) -> bool:
        """True while the client runs that a tethered host belongs to."""
        return self.owner_pid is not None and process_lives(self.owner_pid, self.owner_identity)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def serves(self, path: Path) -> bool:
        """Whether the host that wrote it serves this path: a copied folder has the record of another's host."""
        try:
            return os.path.samefile(self.path, path)
        except OSError:
            return False


def read_host(path: Path) -> HostRecord | None:
    """The record of the path's host, or None when there is none, it is another path's or it is unreadable. The host may
    be dead by now.
    """
    record = _read(path / HOST_FILE)
    return record if record is not None and record.serves(path) else None


def write_host(path: Path, record: HostRecord) -> None:
    """Write the record, readable by this user only from the first moment."""
    _write(path / HOST_FILE, record)


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


def remember_host(record: HostRecord) -> None:
    """Add a host to the user's list, so that `art ps` finds it from anywhere, even when its path is gone.

    Raises OSError where there is no place for such a list.
    """
    folder = _list()
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(os.fsencode(record.path)).hexdigest()[:16]
    _write(folder / f"{name}-{record.pid}.json", record)


def known_hosts() -> list[tuple[Path, HostRecord]]:
    """The path and record of every host of this user that runs. Entries of those that don't are removed."""
    found = []
    for entry in entries_in(_list()):
        if entry.suffix != ".json":
            continue
        record = _read(entry)
        if record is not None and record.alive:
            found.append((Path(record.path), record))
        else:
            entry.unlink(missing_ok=True)
    return found


def _list() -> Path:
    return state_dir() / "hosts"


def _read(file: Path) -> HostRecord | None:
    try:
        return HostRecord(**json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, record: HostRecord) -> None:
    temporary = file.with_name(f".{file.name}.{uuid4().hex[:8]}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as text:
            json.dump(asdict(record), text)
            text.flush()
            os.fsync(text.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
