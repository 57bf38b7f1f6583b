"""One rollout that misbehaves is one failed rollout, whatever it does; the others are kept."""

import argparse
import asyncio
import contextlib
import subprocess
import sys
import textwrap

import pytest

import art


async def good(reward=1.0):
    await asyncio.sleep(0)
    return art.Trajectory(reward=reward)


async def exits():
    sys.exit(1)


async def exits_by_argparse():
    argparse.ArgumentParser().parse_args(["--no-such-option"])


async def cancels_itself():
    asyncio.current_task().cancel()
    await asyncio.sleep(0)
    return art.Trajectory()


async def cancels_itself_and_returns():
    asyncio.current_task().cancel()
    return art.Trajectory()


async def cancels_itself_twice():
    asyncio.current_task().cancel()
    asyncio.current_task().cancel()
    await asyncio.sleep(0)
    return art.Trajectory()


async def cancels_a_task_that_it_awaits():
    task = asyncio.ensure_future(asyncio.Event().wait())
    asyncio.get_running_loop().call_soon(task.cancel)
    await task
    return art.Trajectory()


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class SaysNumbers(Exception):
    def __str__(self):
        return 5


class Outside(BaseException):
    pass


async def raises(error):
    raise error


def raising(error):
    return lambda: raises(error)


MISBEHAVING = {
    "SystemExit": exits,
    "SystemExit of argparse": exits_by_argparse,
    "CancelledError": cancels_itself,
    "CancelledError at once": cancels_itself_and_returns,
    "CancelledError twice": cancels_itself_twice,
    "CancelledError of another": cancels_a_task_that_it_awaits,
    "Unspeakable": raising(Unspeakable()),
    "SaysNumbers": raising(SaysNumbers()),
    "KeyError of the unspeakable": raising(KeyError(Unspeakable())),
    "Outside": raising(Outside("of Exception")),
    "ExceptionGroup": raising(ExceptionGroup("two", [ValueError("1"), Unspeakable()])),
    "GeneratorExit": raising(GeneratorExit()),
}


@pytest.fixture(params=MISBEHAVING)
def misbehaving(request):
    return MISBEHAVING[request.param], request.param.partition(" ")[0]


async def test_it_is_one_exception_of_its_group(misbehaving):
    rollout, kind = misbehaving
    groups = await art.gather_trajectory_groups(
        [
            art.TrajectoryGroup([good(1), rollout(), good(2)]),
            art.TrajectoryGroup([good(3), rollout()]),
        ],
        max_exceptions=2,
    )
    assert [[t.reward for t in group] for group in groups] == [[1, 2], [3]]
    assert [[error.type for error in group.exceptions] for group in groups] == [[kind], [kind]]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_it_is_one_exception_in_place(misbehaving):
    rollout, kind = misbehaving
    first, failed, last = await art.gather_trajectories([good(1), rollout(), good(2)], max_exceptions=1)
    assert (first.reward, type(failed).__name__, last.reward) == (1, kind, 2)


async def test_it_is_one_too_many_where_none_is_allowed(misbehaving):
    rollout, kind = misbehaving
    with pytest.raises(art.RolloutsFailed, match="1 rollout raised") as raised:
        await art.gather_trajectory_groups([art.TrajectoryGroup([good(), rollout()])], pbar_desc=None)
    assert [type(error).__name__ for error in raised.value.exceptions] == [kind]
    with pytest.raises(art.RolloutsFailed):
        await art.gather_trajectories([good(), rollout()], pbar_desc=None)


async def test_a_group_awaited_by_itself_keeps_the_others(misbehaving):
    rollout, kind = misbehaving
    group = await art.TrajectoryGroup([good(1), rollout(), good(2)])
    assert [t.reward for t in group] == [1, 2]
    assert [error.type for error in group.exceptions] == [kind]


async def test_an_awaitable_of_a_group_that_misbehaves_is_one_exception(misbehaving):
    rollout, kind = misbehaving
    kept, lost = await art.gather_trajectory_groups(
        [art.TrajectoryGroup([good()]), rollout()], pbar_desc=None, max_exceptions=1
    )
    assert (len(kept), len(lost)) == (1, 0)
    assert [error.type for error in lost.exceptions] == [kind]


async def test_an_after_each_that_misbehaves_costs_its_group(misbehaving):
    rollout, _ = misbehaving

    async def after(group):
        return await rollout() if group[0].reward == 1 else group

    with pytest.warns(RuntimeWarning, match="its group is left out"):
        kept = await art.gather_trajectory_groups(
            [art.TrajectoryGroup([good(reward)]) for reward in (0, 1, 2)],
            pbar_desc=None,
            max_exceptions=1,
            after_each=after,
        )
    assert [group[0].reward for group in kept] == [0, 2]


async def test_an_after_each_that_is_no_coroutine_function_may_exit_too():
    with pytest.warns(RuntimeWarning, match="after_each raised SystemExit: 3; its group is left out"):
        kept = await art.gather_trajectory_groups(
            [art.TrajectoryGroup([good()])], pbar_desc=None, max_exceptions=1, after_each=lambda group: sys.exit(3)
        )
    assert kept == []


async def test_a_message_that_cannot_be_made_is_said_to_be_none():
    (group,) = await art.gather_trajectory_groups(
        [art.TrajectoryGroup([raises(Unspeakable()), raises(ValueError("said"))])], pbar_desc=None, max_exceptions=2
    )
    unspeakable, said = group.exceptions
    assert str(unspeakable) == "Unspeakable: <exception str() failed>"
    assert "test_client_gather_faults.py" in unspeakable.traceback
    assert str(said) == "ValueError: said"


async def test_a_rollout_may_time_itself_out_and_go_on():
    async def rollout():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0):
                await asyncio.sleep(60)
        await asyncio.sleep(0)
        return art.Trajectory(reward=3)

    (trajectory,) = await art.gather_trajectories([rollout()], pbar_desc=None)
    assert trajectory.reward == 3


def test_only_a_keyboard_interrupt_ends_all_and_cleanly():
    code = textwrap.dedent("""
        import asyncio, sys, warnings
        warnings.simplefilter("error")
        import art

        started = set()

        async def rollout(i):
            started.add(i)
            try:
                while i == 7 and len(started) < 24:
                    await asyncio.sleep(0)
                if i == 7:
                    raise KeyboardInterrupt
                await asyncio.Event().wait()
            finally:
                print("ended", i)

        async def main():
            try:
                if sys.argv[1] == "groups":
                    groups = [art.TrajectoryGroup(rollout(8 * g + i) for i in range(8)) for g in range(3)]
                    await art.gather_trajectory_groups(groups, pbar_desc=None)
                else:
                    await art.gather_trajectories((rollout(i) for i in range(24)), pbar_desc=None)
            finally:
                print("left", len(asyncio.all_tasks()) - 1)

        asyncio.run(main())
    """)
    for kind in ("groups", "trajectories"):
        done = subprocess.run(
            [sys.executable, "-c", code, kind], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout.count("ended") == 24, done.stderr
        assert done.stdout.splitlines()[-1] == "left 0"
        assert done.stderr.rstrip().endswith("KeyboardInterrupt")
        for word in ("never awaited", "never retrieved", "destroyed"):
            assert word not in done.stderr
