"""The machine as this process finds it: Python, disk, memory, GPUs, ports and limits. Knows no plugin."""

from __future__ import annotations

import errno
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from art_engine_kit.user_folders import CACHE_VARIABLE, cache_dir

from ..devices import accelerators
from .finding import Finding, State

_GB = 1e9
# The embedded model: a download of 0.1 GB, and what is made of it.
_LEAST_DISK = 0.7 * _GB
_SOME_DISK = 5 * _GB
# The demo was seen to hold 6 GB at its most, server and trainer together, in bf16 on a CPU of two cores.
_LEAST_MEMORY = 2 * _GB
_SOME_MEMORY = 6 * _GB
_LEAST_FILES = 256
_SOME_PROCESSES = 200
_UNLIMITED = resource.RLIM_INFINITY


def python() -> Iterator[Finding]:
    """Its version and where it is."""
    found = f"{platform.python_version()} at {sys.executable}, on {platform.system()} {platform.machine()}"
    if sys.platform != "linux":
        mend = "what a killed process leaves in sessions of its own is ended on Linux only"
        yield Finding(about="python", state=State.NOTE, says=found, mend=mend)
    else:
        yield Finding(about="python", state=State.OK, says=found)


def disk() -> Iterator[Finding]:
    """What is free where ART writes: its cache, and the working folder, where runs go unless a path is given."""
    for what, folder, mend in (
        ("the cache", cache_dir(), f"make room, or: export {CACHE_VARIABLE}=a folder on another disk"),
        ("this folder", Path.cwd(), "make room, or give LocalBackend(path=...) on another disk"),
    ):
        there = folder
        while not there.exists() and there != there.parent:
            there = there.parent
        free = shutil.disk_usage(there).free
        says = f"{free / _GB:.1f} GB free for {what}, {folder}"
        if free < _LEAST_DISK:
            yield Finding(about="disk", state=State.WRONG, says=says, mend=mend)
        elif free < _SOME_DISK:
            mend = f"enough for the embedded model, hardly for an engine's environment; {mend}"
            yield Finding(about="disk", state=State.NOTE, says=says, mend=mend)
        else:
            yield Finding(about="disk", state=State.OK, says=says)


def memory() -> Iterator[Finding]:
    """What is free, a container's limit counted in."""
    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    limit, used = _container_memory()
    if limit is not None and limit < total:
        free, total = min(free, max(0, limit - used)), limit
    says = f"{free / _GB:.1f} of {total / _GB:.1f} GB free, {os.cpu_count()} CPU cores"
    if free < _SOME_MEMORY:
        state = State.WRONG if free < _LEAST_MEMORY else State.NOTE
        mend = "to serve and train the embedded model takes up to 6 GB: end what else runs (art ps lists ART's own)"
        yield Finding(about="memory", state=state, says=says, mend=mend)
    else:
        yield Finding(about="memory", state=State.OK, says=says)


def gpu() -> Iterator[Finding]:
    """The GPUs that this process may use, and why there is none where one could be expected."""
    found = accelerators()
    if found:
        says = ", ".join(f"{gpu.name} ({gpu.memory_mib / 1024:.0f} GiB)" for gpu in found)
        yield Finding(about="GPU", state=State.OK, says=says)
        return
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield Finding(about="GPU", state=State.OK, says="none (no nvidia-smi); engines run on the CPU")
        return
    answer = subprocess.run([tool, "-L"], capture_output=True, text=True, errors="replace", timeout=30)
    listed = answer.stdout.strip() if answer.returncode == 0 else ""
    if listed and "CUDA_VISIBLE_DEVICES" in os.environ:
        says = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides every GPU; engines run on the CPU"
        yield Finding(about="GPU", state=State.NOTE, says=says, mend="unset CUDA_VISIBLE_DEVICES")
    else:
        reason = " ".join((answer.stderr.strip() or answer.stdout.strip()).split()[:20])
        says = f"nvidia-smi is here and names no GPU ({reason}); engines run on the CPU"
        yield Finding(about="GPU", state=State.NOTE, says=says, mend="if there is one, mend its driver: nvidia-smi")


def ports() -> Iterator[Finding]:
    """Whether this machine can be listened on and reached at 127.0.0.1."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5):
            port = server.getsockname()[1]
    except OSError as error:
        mend = "servers and clients meet at 127.0.0.1: bring the loopback interface up (ip link set lo up)"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            mend = "too many files are open: ulimit -n 4096"
        yield Finding(about="ports", state=State.WRONG, says=f"127.0.0.1 can't be used: {error}", mend=mend)
    else:
        yield Finding(about="ports", state=State.OK, says=f"127.0.0.1 can be listened on and reached (port {port})")


def limits() -> Iterator[Finding]:
    """Open files, processes, and sizes that this user's processes are held to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    words = f"{_count(soft)} open files, at most {_count(hard)}"
    if hard != _UNLIMITED and hard < _LEAST_FILES:
        mend = "a server needs some hundred: raise the hard limit (ulimit -Hn, or the container's --ulimit nofile)"
        yield Finding(about="limits", state=State.WRONG, says=words, mend=mend)
    else:
        yield Finding(about="limits", state=State.OK, says=f"{words}; ART raises its own")
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if processes != _UNLIMITED and os.geteuid() != 0:
        # The kernel counts threads.
        running = sum(_threads(process) for process in psutil.process_iter(["uids", "num_threads"]))
        if processes - running < _SOME_PROCESSES:
            says = f"{running} of {processes} processes and threads of this user run"
            mend = "a server and a trainer start some dozens: ulimit -u, or end what else runs"
            yield Finding(about="limits", state=State.WRONG, says=says, mend=mend)
    for name, limit, option in (
        ("address space", resource.RLIMIT_AS, "v"),
        ("size of a file", resource.RLIMIT_FSIZE, "f"),
    ):
        held_to = resource.getrlimit(limit)[0]
        if held_to != _UNLIMITED:
            yield Finding(
                about="limits",
                state=State.WRONG if held_to < _LEAST_MEMORY else State.NOTE,
                says=f"the {name} is limited to {held_to / _GB:.2f} GB",
                mend=f"weights may not fit: ulimit -{option} unlimited",
            )


def _threads(process: psutil.Process) -> int:
    uids = process.info["uids"]
    return int(process.info["num_threads"] or 1) if uids is not None and uids.real == os.getuid() else 0


def _count(limit: int) -> str:
    return "any number" if limit == _UNLIMITED else str(limit)


def _container_memory() -> tuple[int | None, int]:
    """The limit of this process's control group and how much is used, of either version; None without one."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            words = Path(limit).read_text(encoding="ascii").strip()
            if words.isdigit():
                return int(words), int(Path(used).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
    return None, 0
