"""A PostgreSQL of the tests' own, on this machine's installed binaries: started in a temporary folder, and ended."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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


@contextmanager
def postgresql() -> Iterator[str]:
    """Gives the address of the server, with a password in it, up to the name of a database."""
    folder = Path(tempfile.mkdtemp(prefix="art-postgresql-"))
    who = {"user": _user(), "group": pwd.getpwnam(_user() or "nobody").pw_gid} if os.geteuid() == 0 else {}
    if who:
        shutil.chown(folder, _user())
    password = secrets.token_hex(16)
    (folder / "password").write_text(password)
    (folder / "password").chmod(0o644)
    programs = binaries()
    assert programs is not None
    made = subprocess.run(
        [
            *(programs / "initdb", "--pgdata", folder / "data", "--username", "art", "--auth", "scram-sha-256"),
            *("--pwfile", folder / "password", "--no-sync"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        **who,
    )
    assert made.returncode == 0, made.stderr
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off"}
    settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [programs / "postgres", "-D", folder / "data", *settings], stdout=log, stderr=log, **who
        )
    try:
        address = f"postgresql://art:{password}@127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(f"{address}/postgres", connect_timeout=2).close()
                break
            except psycopg.OperationalError:
                assert server.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
        yield address
    finally:
        server.terminate()
        server.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def new_database(address: str) -> str:
    """A database that is empty; gives its URL."""
    name = f"art_{uuid4().hex}"
    with psycopg.connect(f"{address}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return f"{address}/{name}"
