"""What a gathering shows while it runs: a bar that moves on a terminal, plain lines in a log."""

import asyncio
import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
import textwrap

import pytest

import art
from art import progress

GATHER = textwrap.dedent("""
    import asyncio, art

    async def rollout(number):
        await asyncio.sleep(number / 50)
        return art.Trajectory(reward=1.0)

    asyncio.run(art.gather_trajectories([rollout(number) for number in range(20)], pbar_desc="play"))
""")


@pytest.mark.slow
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


@pytest.mark.slow
def test_in_a_log_a_short_gathering_is_one_line():
    done = subprocess.run([sys.executable, "-c", GATHER], capture_output=True, text=True, timeout=60, check=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith("play: 100%, 20/20 [")
    assert "reward=1" in line
    assert "\r" not in done.stderr


@pytest.mark.slow
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


async def test_a_rollout_that_does_not_end_is_named_with_how_long_it_has_run(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.1)
    said = asyncio.Event()

    async def rollout(number):
        if number == 5:
            await said.wait()
        return art.Trajectory(reward=1.0)

    groups = [art.TrajectoryGroup(rollout(3 * g + i) for i in range(3)) for g in range(2)]
    gathering = asyncio.create_task(art.gather_trajectory_groups(groups, pbar_desc="play"))
    lines = []
    async with asyncio.timeout(30):
        while not any(re.search(r"waiting for groups\[1\]\[2\], running for \d+ s", line) for line in lines):
            await asyncio.sleep(0.05)
            lines += capsys.readouterr().err.splitlines()
    said.set()
    await gathering
    assert "waiting" not in capsys.readouterr().err.splitlines()[-1]


async def test_whatever_else_a_gathering_waits_for_is_named_too(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.1)
    over = asyncio.Event()

    async def a_group():
        await over.wait()
        return art.TrajectoryGroup([art.Trajectory(reward=1.0)])

    async def keep(group):
        await over.wait()
        return group

    async def batches():
        waiting = (art.TrajectoryGroup([each]) for each in [asyncio.sleep(3600)])
        async for _ in art.trajectory_group_batches(waiting, batch_size=1):
            raise AssertionError("it never ends")

    ready = art.TrajectoryGroup([art.Trajectory(reward=1.0)])
    for gathering, named in (
        (art.gather_trajectory_groups([a_group(), a_group()]), "waiting for groups[0], running for"),
        (art.gather_trajectory_groups([ready], after_each=keep), "waiting for after_each of groups[0], running for"),
        (art.gather_trajectories([asyncio.sleep(3600)]), "waiting for trajectories[0], running for"),
        (batches(), "waiting for batch 0, running for"),
    ):
        task, said = asyncio.ensure_future(gathering), ""
        async with asyncio.timeout(30):
            while named not in said:
                await asyncio.sleep(0.05)
                said += capsys.readouterr().err
        task.cancel()
        await asyncio.wait([task])
