"""Servers from launch plans: readiness, early death, strangers on the port, stopping, and what errors say."""

from __future__ import annotations

import asyncio
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from art_core import LaunchPlan
from art_core.errors import ProcessFailed
from art_runtime import Accelerator, StartProgress, SupervisedProcess, accelerators, check_port_is_ours, free_port

_SERVER = """
import http.server, os, sys, time
port, ready_after = int(sys.argv[1]), float(sys.argv[2])
began = time.monotonic()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if time.monotonic() - began > ready_after else 503)
        self.end_headers()
    def log_message(self, *arguments):
        pass
print("loading weights with", os.environ.get("ART_TEST_KEY"), flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def _plan(port: int, program: str = _SERVER, *, ready_after: float = 0.0, **fields: object) -> LaunchPlan:
    return LaunchPlan(argv=(sys.executable, "-c", program, str(port), str(ready_after)), **fields)  # type: ignore[arg-type]


async def test_a_server_is_ready_then_stops(tmp_path: Path) -> None:
    port = free_port()
    server = await SupervisedProcess.start(_plan(port), port=port, log_file=tmp_path / "log", name="web")
    assert server.running
    assert server.base_url == f"http://127.0.0.1:{port}"
    ended, again = await asyncio.gather(server.stop(), server.stop())
    assert ended == again
    assert ended.expected
    assert ended.code == -signal.SIGTERM
    assert not server.running
    assert (await server.stop()) == ended


@pytest.mark.slow
async def test_waiting_is_shown(tmp_path: Path) -> None:
    port = free_port()
    seen: list[StartProgress] = []
    plan = _plan(port, ready_after=1.2)
    server = await SupervisedProcess.start(plan, port=port, log_file=tmp_path / "log", on_progress=seen.append)
    await server.stop()
    assert seen
    assert seen[-1].last_line.startswith("loading weights")
    assert [p.seconds for p in seen] == sorted(p.seconds for p in seen)


async def test_secrets_are_in_no_error_and_no_repr(tmp_path: Path) -> None:
    port = free_port()
    plan = _plan(
        port,
        "import os\nraise SystemExit('bad key ' + os.environ['ART_TEST_KEY'])",
        secret_env={"ART_TEST_KEY": "hunter2"},
    )
    with pytest.raises(ProcessFailed, match=r"bad key \*\*\*") as caught:
        await SupervisedProcess.start(plan, port=port, log_file=tmp_path / "log", name="engine torch")
    assert "hunter2" not in str(caught.value)
    assert "exit code 1" in str(caught.value)
    assert str(tmp_path / "log") in str(caught.value)
    server = await SupervisedProcess.start(
        _plan(port, secret_env={"ART_TEST_KEY": "hunter2"}), port=port, log_file=tmp_path / "log"
    )
    assert "hunter2" not in repr(server) + repr(server.__dict__) + server.log_tail()
    assert "loading weights with ***" in server.log_tail()
    await server.stop()


async def test_early_death_is_noticed_long_before_the_limit(tmp_path: Path) -> None:
    port = free_port()
    plan = _plan(port, "raise SystemExit('CUDA out of memory')", ready_timeout_s=600)
    async with asyncio.timeout(60):
        with pytest.raises(ProcessFailed, match="CUDA out of memory"):
            await SupervisedProcess.start(plan, port=port, log_file=tmp_path / "log")


async def test_death_is_noticed_though_a_stranger_on_the_port_keeps_silent(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        plan = _plan(port, "raise SystemExit('the port is taken')", ready_timeout_s=1)
        with pytest.raises(ProcessFailed, match="exit code 1"):
            await SupervisedProcess.start(plan, port=port, log_file=tmp_path / "log")


@pytest.mark.slow
async def test_a_server_that_never_gets_ready_is_ended(tmp_path: Path) -> None:
    port = free_port()
    plan = _plan(port, ready_after=600.0, ready_timeout_s=0.5)
    with pytest.raises(ProcessFailed, match=r"(?s)wasn't ready after 0.5 s.*loading weights"):
        await SupervisedProcess.start(plan, port=port, log_file=tmp_path / "log")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


@pytest.mark.slow
async def test_a_cancelled_start_leaves_nothing_running(tmp_path: Path) -> None:
    port = free_port()
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    plan = _plan(port, ready_after=600.0)
    starting = asyncio.create_task(SupervisedProcess.start(plan, port=port, log_file=tmp_path / "log"))
    await asyncio.sleep(0.5)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert {process.pid for process in psutil.Process().children(recursive=True)} == before


@pytest.mark.slow
async def test_a_stranger_on_the_port_is_not_taken_for_our_server(tmp_path: Path) -> None:
    class Stranger(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            return None

    stranger = http.server.HTTPServer(("127.0.0.1", 0), Stranger)
    threading.Thread(target=stranger.serve_forever, daemon=True).start()
    port = stranger.server_address[1]
    try:
        with pytest.raises(ProcessFailed, match=f"process {os.getpid()} .*listens there"):
            await SupervisedProcess.start(
                _plan(port, "import time; time.sleep(300)"), port=port, log_file=tmp_path / "log"
            )
    finally:
        await asyncio.to_thread(stranger.shutdown)
        stranger.server_close()


async def test_death_later_is_told_at_once_with_the_end_of_the_log(tmp_path: Path) -> None:
    port = free_port()
    plan = _plan(port)
    server = await SupervisedProcess.start(plan, port=port, log_file=tmp_path / "log", name="engine torch")
    program = psutil.Process(server.pid).children()[0]
    program.kill()
    async with asyncio.timeout(10):
        ended = await server.wait_exit()
    assert not ended.expected
    assert ended.code == -signal.SIGKILL
    assert "out of memory" in str(ended)
    assert "loading weights" in str(ended)


async def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    plan = LaunchPlan(argv=("/nowhere/python", "-m", "engine"))
    with pytest.raises(ProcessFailed, match="no such program"):
        await SupervisedProcess.start(plan, port=free_port(), log_file=tmp_path / "log")


def test_free_ports_differ_and_can_be_listened_on() -> None:
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    with socket.create_server(("127.0.0.1", ports[0])):
        check_port_is_ours(ports[0], os.getpid())
        assert free_port() != ports[0]
    with pytest.raises(ProcessFailed, match="has left since"):
        check_port_is_ours(ports[0], os.getpid())


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Give the machine a driver's tool that runs a shell line; until then it has none."""

    def install(line: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        tool.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    accelerators.cache_clear()
    yield install
    accelerators.cache_clear()


def test_devices_are_read_from_the_drivers_table(
    driver: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver("printf '0, GPU-aaa, NVIDIA H200, 143771\\n1, GPU-bbb, NVIDIA H200, 143771\\nnonsense\\n'")

    def visible(setting: str | None) -> tuple[Accelerator, ...]:
        if setting is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        accelerators.cache_clear()
        return accelerators()

    both = visible(None)
    assert [(gpu.index, gpu.name, gpu.memory_mib) for gpu in both] == [
        (0, "NVIDIA H200", 143771),
        (1, "NVIDIA H200", 143771),
    ]
    assert visible("") == ()
    assert visible("1,0") == (both[1], both[0])
    assert visible("GPU-b") == (both[1],)
    assert visible("0,7,1") == (both[0],)


def test_a_machine_without_the_drivers_tool_has_no_accelerators(driver: Callable[[str], None]) -> None:
    assert accelerators() == ()


def test_a_driver_that_fails_counts_as_none(driver: Callable[[str], None]) -> None:
    driver("echo 'NVIDIA-SMI has failed'; exit 9")
    assert accelerators() == ()


def test_importing_the_runtime_loads_no_framework() -> None:
    script = "import sys, art_runtime; print(sorted({'torch', 'transformers', 'numpy', 'aiohttp'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
