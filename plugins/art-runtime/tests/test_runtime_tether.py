"""Processes end with their owner: real processes, real SIGKILL, grandchildren that try to slip away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import art_runtime
from art_core.errors import ProcessFailed
from art_runtime import Child, spawn_detached, spawn_tethered

_FAMILY = Path(__file__).with_name("process_family.py")
_OWNER = """
import os, sys, time
from art_runtime import spawn_tethered
child = spawn_tethered([sys.executable, *sys.argv[2:]], stop_timeout_s=float(sys.argv[1]))
if os.fork() == 0:
    os.setsid()  # A fork without exec holds every descriptor of the owner, the pipe among them.
    time.sleep(300)
time.sleep(300)
"""


def _wait_for(path: Path) -> list[int]:
    give_up = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < give_up, f"{path.name} was never written"
        time.sleep(0.02)
    return [int(pid) for pid in path.read_text(encoding="utf-8").split()]


def _wait_gone(pids: list[int], limit_s: float) -> list[int]:
    """Those of `pids` that still run after the limit."""
    give_up = time.monotonic() + limit_s
    while left := [pid for pid in pids if _runs(pid)]:
        if time.monotonic() > give_up:
            return left
        time.sleep(0.02)
    return []


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def kill_later() -> Iterator[list[int]]:
    pids: list[int] = []
    yield pids
    for pid in pids:
        if _runs(pid):
            os.kill(pid, signal.SIGKILL)


def _family(tmp_path: Path, manners: str, stop_timeout_s: float) -> tuple[Child, list[int]]:
    child = spawn_tethered(
        [sys.executable, str(_FAMILY), str(tmp_path / "pids"), manners],
        log_file=tmp_path / "log",
        stop_timeout_s=stop_timeout_s,
    )
    return child, _wait_for(tmp_path / "pids")


@pytest.mark.slow
@pytest.mark.parametrize(("manners", "stop_timeout_s"), [("polite", 20.0), ("stubborn", 0.5)])
def test_a_killed_owner_takes_the_whole_tree_with_it(
    tmp_path: Path, kill_later: list[int], manners: str, stop_timeout_s: float
) -> None:
    pids_file = tmp_path / "pids"
    arguments = [str(stop_timeout_s), str(_FAMILY), str(pids_file), manners]
    owner = subprocess.Popen([sys.executable, "-c", _OWNER, *arguments])
    kill_later.append(owner.pid)
    family = _wait_for(pids_file)
    below = psutil.Process(owner.pid).children()
    kill_later += [*family, *(process.pid for process in below)]
    assert len(family) == 4
    assert all(_runs(pid) for pid in family)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait(10)
    assert _wait_gone(family, 15) == []
    # The fork lives on, which shows that it was not its end that closed the pipe.
    assert [_runs(process.pid) for process in below].count(True) >= 1


@pytest.mark.parametrize(("manners", "stop_timeout_s"), [("polite", 20.0), ("stubborn", 0.5)])
def test_stop_ends_the_whole_tree(tmp_path: Path, kill_later: list[int], manners: str, stop_timeout_s: float) -> None:
    child, family = _family(tmp_path, manners, stop_timeout_s)
    kill_later += family
    code = child.stop()
    assert code == (-signal.SIGTERM if manners == "polite" else -signal.SIGKILL)
    assert [pid for pid in family if _runs(pid)] == []
    assert child.stop() == code


def test_kill_waits_for_nothing(tmp_path: Path, kill_later: list[int]) -> None:
    child, family = _family(tmp_path, "stubborn", 300.0)
    kill_later += family
    child.kill()
    assert child.wait(10) == -signal.SIGKILL
    assert [pid for pid in family if _runs(pid)] == []


def test_a_second_end_kills_at_once(tmp_path: Path, kill_later: list[int]) -> None:
    child, family = _family(tmp_path, "stubborn", 300.0)
    kill_later += family
    child.end()
    with pytest.raises(TimeoutError):
        child.wait(0.3)
    child.end()
    assert child.wait(10) == -signal.SIGKILL
    assert [pid for pid in family if _runs(pid)] == []


def test_a_program_that_dies_leaves_nothing_behind(tmp_path: Path, kill_later: list[int]) -> None:
    child, family = _family(tmp_path, "polite", 20.0)
    kill_later += family
    os.kill(family[0], signal.SIGSEGV)
    assert child.wait(15) == -signal.SIGSEGV
    assert [pid for pid in family if _runs(pid)] == []
    assert "left processes behind" in (tmp_path / "log").read_text(encoding="utf-8")


def test_letting_go_ends_it(tmp_path: Path, kill_later: list[int]) -> None:
    child, family = _family(tmp_path, "polite", 20.0)
    kill_later += family
    child.let_go()
    child.let_go()
    assert child.wait(15) == -signal.SIGTERM
    assert [pid for pid in family if _runs(pid)] == []


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_code_is_the_programs(code: int) -> None:
    child = spawn_tethered([sys.executable, "-c", f"raise SystemExit({code})"])
    assert child.wait(15) == code
    assert child.poll() == code
    child.let_go()


def test_environment_and_arguments_arrive_and_secrets_stay_out_of_the_log(tmp_path: Path) -> None:
    program = "import os, sys; print(sys.argv[1:], os.environ['ART_TEST_OPEN'], len(os.environ['ART_TEST_SECRET']))"
    log = tmp_path / "logs" / "engine.log"
    child = spawn_tethered(
        [sys.executable, "-c", program, "a b", "--", "-c"],
        {"ART_TEST_OPEN": "yes", "ART_TEST_SECRET": "hunter2"},
        log_file=log,
    )
    assert child.wait(15) == 0
    child.let_go()
    text = log.read_text(encoding="utf-8")
    assert "['a b', '--', '-c'] yes 7" in text
    assert "hunter2" not in text
    assert log.stat().st_mode & 0o077 == 0


def test_no_descriptor_of_the_tether_reaches_the_program(tmp_path: Path) -> None:
    program = "import os; print(sorted(int(fd) for fd in os.listdir('/proc/self/fd'))[:-1])"
    child = spawn_tethered([sys.executable, "-c", program], log_file=tmp_path / "log")
    assert child.wait(15) == 0
    child.let_go()
    assert "[0, 1, 2]" in (tmp_path / "log").read_text(encoding="utf-8")


def test_a_program_that_does_not_exist_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailed, match="no such program"):
        spawn_tethered(["no-such-program-anywhere"])
    with pytest.raises(ProcessFailed, match="no such folder"):
        spawn_tethered([sys.executable], cwd=tmp_path / "missing")
    with pytest.raises(ValueError, match="empty"):
        spawn_tethered([])


def test_a_log_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ProcessFailed, match=r"its log at .*file"):
        spawn_tethered([sys.executable, "-c", "0"], log_file=tmp_path / "file" / "log")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which takes no byte")
def test_a_full_disk_does_not_keep_the_tether_from_ending_the_tree(tmp_path: Path, kill_later: list[int]) -> None:
    tether = Path(art_runtime.__file__).with_name("tether.py")
    reading, holding = os.pipe()
    command = [sys.executable, "-I", "-S", str(tether), str(os.getpid()), str(reading), "20", "all"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        process = subprocess.Popen(
            [*command, sys.executable, str(_FAMILY), str(tmp_path / "pids"), "polite"],
            pass_fds=[reading],
            stdout=full,
            stderr=full,
        )
    family = _wait_for(tmp_path / "pids")
    kill_later += family
    os.close(reading)
    os.close(holding)
    assert process.wait(15) == -signal.SIGTERM
    assert [pid for pid in family if _runs(pid)] == []


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.03, 0.05, 0.1])
def test_an_end_that_comes_at_once_is_not_lost(delay_s: float) -> None:
    child = spawn_tethered(["sleep", "300"], stop_timeout_s=200)
    time.sleep(delay_s)
    child.end()
    assert child.wait(30) in (-signal.SIGTERM, 0)
    child.let_go()


@pytest.mark.slow
def test_a_detached_program_outlives_its_owner_and_can_be_stopped(tmp_path: Path, kill_later: list[int]) -> None:
    program = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(300)"
    script = (
        "import sys, time; from art_runtime import spawn_detached\n"
        f"spawn_detached([sys.executable, '-c', {program!r}, sys.argv[1]]); time.sleep(300)"
    )
    owner = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "pid")])
    kill_later.append(owner.pid)
    (pid,) = _wait_for(tmp_path / "pid")
    kill_later.append(pid)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait(10)
    assert _wait_gone([pid], 0.5) == [pid]

    child = spawn_detached([sys.executable, "-c", program, str(tmp_path / "second")])
    _wait_for(tmp_path / "second")
    assert "detached, running" in repr(child)
    assert child.stop() == -signal.SIGTERM


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no processes to cores")
def test_a_program_and_its_children_keep_to_the_cores_that_they_were_given(tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    code = "import os, subprocess, sys; print(sorted(os.sched_getaffinity(0)), flush=True);" + (
        "subprocess.run([sys.executable, '-c', 'import os; print(sorted(os.sched_getaffinity(0)))'])"
    )
    for given, expected in (((core,), [core]), ((), sorted(os.sched_getaffinity(0)))):
        log = tmp_path / f"{len(given)}.log"
        child = spawn_tethered([sys.executable, "-c", code], log_file=log, cores=given)
        assert child.wait(60) == 0
        child.let_go()
        assert log.read_text().splitlines()[1:] == [str(expected)] * 2
