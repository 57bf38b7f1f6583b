"""What a gathering shows while it runs: a bar that moves on a terminal, plain lines in a log."""

import asyncio
import contextlib
import os
import pty
import subprocess
import sys
import termios
import textwrap

import art
from art import progress

GATHER = textwrap.dedent("""
    import asyncio, art

    async def rollout(number):
        await asyncio.sleep(number / 50)
        return art.Trajectory(reward=1.0)

    asyncio.run(art.gather_trajectories([rollout(number) for number in range(20)], pbar_desc="play"))
""")


def test_on_a_terminal_the_bar_is_drawn_over_and_over():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen([sys.executable, "-c", GATHER], stderr=theirs)
    os.close(theirs)
    shown = b""
    # A terminal that nobody has open any more says so with an error.
    with contextlib.suppress(OSError):
        while part := os.read(ours, 4096):
            shown += part
    assert process.wait(timeout=60) == 0
    os.close(ours)
    assert shown.count(b"\r") > 2
    assert b"play: 100%" in shown.split(b"\r")[-2]


def test_in_a_log_a_short_gathering_is_one_line():
    done = subprocess.run([sys.executable, "-c", GATHER], capture_output=True, text=True, timeout=60, check=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith("play: 100%, 20/20 [")
    assert "reward=1" in line
    assert "\r" not in done.stderr


async def test_in_a_log_a_long_gathering_says_now_and_then_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.1)

    async def rollout(number):
        await asyncio.sleep(number * 0.05)
        return art.Trajectory(reward=float(number))

    await art.gather_trajectories([rollout(number) for number in range(20)], pbar_desc="play")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2
    assert lines[-1].startswith("play: 100%, 20/20 [")
    assert all("%, " in line and "reward=" in line for line in lines)
