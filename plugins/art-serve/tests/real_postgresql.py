"""A PostgreSQL of the tests' own, on this machine's installed binaries: started in a temporary folder, and ended."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg


def binaries() -> Path | None:
    """The folder of `initdb` and `postgres`; None where PostgreSQL isn't installed."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


def missing() -> str:
    """Why there is none, empty where there is one."""
    if binaries() is None:
        return "PostgreSQL is not installed: apt-get install postgresql"
    if os.geteuid() == 0 and _user() is None:
        return "PostgreSQL doesn't run as root, and there is no user postgres or nobody to run it as"
    return ""


def _user() -> str | None:
    there = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in there), None)


class PostgreSQL:
    """A server in a folder of its own; `address` has a password in it and goes up to the name of a database."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._who: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = _user()
            assert user is not None
            self._who = {"user": user, "group": pwd.getpwnam(user).pw_gid}
            shutil.chown(folder, user)
        programs = binaries()
        assert programs is not None
        self._programs = programs
        password = secrets.token_hex(16)
        (folder / "password").write_text(password)
        (folder / "password").chmod(0o644)
        made = subprocess.run(
            [
                *(programs / "initdb", "--pgdata", folder / "data", "--username", "art", "--auth", "scram-sha-256"),
                *("--pwfile", folder / "password", "--no-sync"),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            **self._who,
        )
        assert made.returncode == 0, made.stderr
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.address = f"postgresql://art:{password}@127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = {"listen_addresses": "127.0.0.1", "port": self._port, "unix_socket_directories": "", "fsync": "off"}
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with (self._folder / "log").open("w") as log:
            command = [self._programs / "postgres", "-D", self._folder / "data", *settings]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, **self._who)
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(f"{self.address}/postgres", connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                said = (self._folder / "log").read_text()
                assert self._process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.05)

    def new_database(self) -> str:
        """A database that is empty; gives its URL."""
        name = f"art_{uuid4().hex}"
        with psycopg.connect(f"{self.address}/postgres", autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return f"{self.address}/{name}"

    def stop(self) -> None:
        """End it, and every connection to it."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGINT)
            process.wait(60)


@contextmanager
def postgresql() -> Iterator[PostgreSQL]:
    """A server that runs."""
    folder = Path(tempfile.mkdtemp(prefix="art-postgresql-"))
    try:
        server = PostgreSQL(folder)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
