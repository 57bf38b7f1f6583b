import asyncio
import math
import re
import subprocess
import sys
import textwrap

import pytest
from openai.types.chat.chat_completion import Choice

import art
from art_core import RolloutError


async def rollout(reward=1.0, *, wait=0, error=None, **fields):
    for _ in range(wait):
        await asyncio.sleep(0)
    if error is not None:
        raise error
    return art.Trajectory(reward=reward, **fields)


def choice(version):
    return Choice.model_validate(
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "x"},
            "policy_version": version,
            "token_ids": [1, 2, 3],
        }
    )


async def forever(log):
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        log.append("cancelled")
        raise


def start(coroutine):
    return asyncio.get_running_loop().create_task(coroutine)


def other_tasks():
    return asyncio.all_tasks() - {asyncio.current_task()}


async def test_groups_and_trajectories_keep_their_order():
    groups = await art.gather_trajectory_groups(
        (art.TrajectoryGroup((rollout(10 * g + i, wait=3 - i) for i in range(4)), metadata={"g": g}) for g in range(3)),
        pbar_desc=None,
    )
    assert [[t.reward for t in group] for group in groups] == [[10 * g + i for i in range(4)] for g in range(3)]
    assert [group.metadata for group in groups] == [{"g": g} for g in range(3)]
    assert not other_tasks()


async def test_everything_runs_at_once():
    running, everyone = 0, asyncio.Event()

    async def attempt():
        nonlocal running
        running += 1
        if running == 40:
            everyone.set()
        await asyncio.wait_for(everyone.wait(), 10)
        return art.Trajectory()

    groups = await art.gather_trajectory_groups(
        (art.TrajectoryGroup(attempt() for _ in range(4)) for _ in range(10)), pbar_desc=None
    )
    assert sum(map(len, groups)) == 40


async def test_other_awaitables_of_groups_and_finished_groups():
    async def group_of(reward):
        return art.TrajectoryGroup([art.Trajectory(reward=reward)])

    finished = art.TrajectoryGroup([art.Trajectory(reward=3)])
    pending = art.TrajectoryGroup([rollout(4), art.Trajectory(reward=5)])
    groups = await art.gather_trajectory_groups([group_of(1), finished, pending], pbar_desc=None)
    assert [[t.reward for t in group] for group in groups] == [[1], [3], [4, 5]]


async def test_policy_versions_are_stamped_from_the_choices():
    def attempt(**fields):
        items = [{"role": "user", "content": "?"}, choice(4), choice(6)]
        return rollout(messages_and_choices=items, **fields)

    groups = [art.TrajectoryGroup([attempt(), attempt(initial_policy_version=1), rollout()])]
    ((both, final, none),) = await art.gather_trajectory_groups(groups, pbar_desc=None)
    assert (both.initial_policy_version, both.final_policy_version) == (4, 6)
    assert (final.initial_policy_version, final.final_policy_version) == (1, 6)
    assert (none.initial_policy_version, none.final_policy_version) == (None, None)
    (single,) = await art.gather_trajectories([attempt()], pbar_desc=None)
    assert single.final_policy_version == 6


async def test_one_exception_is_too_many_by_default():
    log = []
    with pytest.raises(art.RolloutsFailed) as raised:
        await art.gather_trajectory_groups(
            [
                art.TrajectoryGroup([forever(log), rollout(error=KeyError("the tool"), wait=2)]),
                art.TrajectoryGroup([forever(log)]),
            ],
            pbar_desc=None,
        )
    text = str(raised.value)
    assert text.startswith("1 rollout raised, where max_exceptions=0 is the limit; the others were cancelled.")
    assert "KeyError: 'the tool'" in text
    assert "test_client_gather.py" in text  # the traceback
    assert isinstance(raised.value.__cause__, KeyError)
    assert [type(error) for error in raised.value.exceptions] == [KeyError]
    assert log == ["cancelled", "cancelled"]
    assert not other_tasks()


async def test_max_exceptions_as_a_number():
    def groups(failing):
        return (art.TrajectoryGroup(rollout(error=ValueError(i) if i < failing else None) for i in range(8)),)

    (group,) = await art.gather_trajectory_groups(groups(3), max_exceptions=3, pbar_desc=None)
    assert (len(group), len(group.exceptions)) == (5, 3)
    assert [str(error) for error in group.exceptions] == [f"ValueError: {i}" for i in range(3)]
    with pytest.raises(art.RolloutsFailed, match="4 rollouts raised, where max_exceptions=3 is the limit"):
        await art.gather_trajectory_groups(groups(4), max_exceptions=3, pbar_desc=None)


async def test_max_exceptions_as_a_share():
    def groups(failing):
        return [
            art.TrajectoryGroup([rollout(error=ValueError("x") if i < failing else None) for i in range(j, j + 4)])
            for j in (0, 4)
        ]

    assert len(await art.gather_trajectory_groups(groups(2), max_exceptions=0.25, pbar_desc=None)) == 2
    with pytest.raises(art.RolloutsFailed, match=re.escape("max_exceptions=0.25 of 8 rollouts is the limit")):
        await art.gather_trajectory_groups(groups(3), max_exceptions=0.25, pbar_desc=None)


@pytest.mark.parametrize("limit", [-1, math.nan, "2", True])
async def test_a_max_exceptions_that_makes_no_sense(limit):
    with pytest.raises(ValueError, match="max_exceptions must be"):
        await art.gather_trajectory_groups([], max_exceptions=limit, pbar_desc=None)


async def test_a_group_whose_awaitable_raises_counts_as_one_exception():
    async def broken():
        raise OSError("no scenario")

    groups = await art.gather_trajectory_groups([broken()], max_exceptions=1, pbar_desc=None)
    assert [error.type for error in groups[0].exceptions] == ["OSError"]
    with pytest.raises(art.RolloutsFailed, match="OSError: no scenario"):
        await art.gather_trajectory_groups([broken()], pbar_desc=None)


async def test_a_rollout_that_returns_something_else():
    async def wrong():
        return 1.0

    with pytest.raises(art.RolloutsFailed, match="must return a Trajectory, not float"):
        await art.gather_trajectory_groups([art.TrajectoryGroup([wrong()])], pbar_desc=None)


async def test_many_failures_show_the_first_only():
    with pytest.raises(art.RolloutsFailed) as raised:
        await art.gather_trajectory_groups(
            [art.TrajectoryGroup(rollout(error=ValueError(f"number {i}")) for i in range(50))],
            max_exceptions=9,
            pbar_desc=None,
        )
    assert "10 rollouts raised" in str(raised.value)
    assert "number 2" in str(raised.value)
    assert "number 3" not in str(raised.value)
    assert "... and 7 more" in str(raised.value)


async def test_after_each_keeps_replaces_and_drops():
    def after(group):
        reward = group[0].reward
        return {0: group, 1: None, 2: [group, art.TrajectoryGroup([art.Trajectory(reward=9)])]}[int(reward)]

    async def after_async(group):
        await asyncio.sleep(0)
        return after(group)

    for function in (after, after_async):
        groups = await art.gather_trajectory_groups(
            (art.TrajectoryGroup([rollout(i)]) for i in range(3)), after_each=function, pbar_desc=None
        )
        assert [group[0].reward for group in groups] == [0, 2, 9]


async def test_an_after_each_that_raises_costs_its_group():
    def judge(group):
        if group[0].reward == 1:
            raise RuntimeError("the judge is ill")
        return group

    def groups():
        return (art.TrajectoryGroup([rollout(i)]) for i in range(3))

    with pytest.warns(RuntimeWarning, match="the judge is ill; its group is left out"):
        kept = await art.gather_trajectory_groups(groups(), after_each=judge, max_exceptions=1, pbar_desc=None)
    assert [group[0].reward for group in kept] == [0, 2]
    with pytest.raises(art.RolloutsFailed, match="the judge is ill"):
        await art.gather_trajectory_groups(groups(), after_each=judge, pbar_desc=None)
    with pytest.raises(art.RolloutsFailed, match="after_each must give a TrajectoryGroup"):
        await art.gather_trajectory_groups(groups(), after_each=lambda group: 3, pbar_desc=None)


async def test_cancelling_leaves_no_task():
    log = []
    task = start(
        art.gather_trajectory_groups(
            [art.TrajectoryGroup(forever(log) for _ in range(3)) for _ in range(3)], pbar_desc=None
        )
    )
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["cancelled"] * 9
    assert not other_tasks()


@pytest.mark.filterwarnings("error")
async def test_cancelling_at_once_leaves_no_coroutine_unawaited():
    task = start(art.gather_trajectory_groups([art.TrajectoryGroup(rollout() for _ in range(3))], pbar_desc=None))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not other_tasks()


def test_ctrl_c_ends_everything_at_once():
    code = textwrap.dedent("""
        import asyncio, os, signal, warnings
        warnings.simplefilter("error")
        import art

        async def rollout(i):
            try:
                if i == 7:
                    os.kill(os.getpid(), signal.SIGINT)
                await asyncio.Event().wait()
            finally:
                print("ended", i)

        async def main():
            try:
                groups = [art.TrajectoryGroup(rollout(8 * g + i) for i in range(8)) for g in range(2)]
                await art.gather_trajectory_groups(groups)
            finally:
                print("left", len(asyncio.all_tasks()) - 1)

        # Tests that run in the background of a shell inherit an ignored SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        asyncio.run(main())
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.count("ended") >= 8
    assert done.stdout.splitlines()[-1] == "left 0"
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert "never awaited" not in done.stderr
    assert "never retrieved" not in done.stderr


async def test_gather_trajectories_keeps_exceptions_in_place():
    results = await art.gather_trajectories(
        [rollout(1), rollout(error=ValueError("two")), rollout(3)], max_exceptions=1, pbar_desc=None
    )
    assert [type(result).__name__ for result in results] == ["Trajectory", "ValueError", "Trajectory"]
    with pytest.raises(art.RolloutsFailed):
        await art.gather_trajectories([rollout(error=ValueError("two"))], pbar_desc=None)


async def test_the_bar_shows_reward_metrics_tokens_and_exceptions(capsys):
    await art.gather_trajectory_groups(
        [
            art.TrajectoryGroup(
                [
                    rollout(1.0, metrics={"hits": 2, "misses": 1}, messages_and_choices=[choice(1), choice(1)]),
                    rollout(2.0, metrics={"hits": 4, "misses": 1}),
                    rollout(error=ValueError("x")),
                ]
            )
        ],
        pbar_desc="play",
        pbar_total_completion_tokens=True,
        max_exceptions=1,
        max_metrics=1,
    )
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "play: 100%" in shown
    assert "3/3" in shown
    assert "reward=1.5" in shown
    assert "hits=3" in shown
    assert "misses" not in shown
    assert "completion_tokens=6" in shown
    assert "exceptions=1" in shown


async def test_no_description_shows_no_bar(capsys):
    await art.gather_trajectory_groups([art.TrajectoryGroup([rollout()])], pbar_desc=None)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
async def test_ten_thousand_groups():
    groups = await art.gather_trajectory_groups(
        (art.TrajectoryGroup([rollout(i, metrics={"m": 1})]) for i in range(10_000)), pbar_desc="gather"
    )
    assert [group[0].reward for group in groups] == list(range(10_000))


async def test_nothing_to_gather():
    assert await art.gather_trajectory_groups([], pbar_desc=None) == []
    assert await art.gather_trajectories([], pbar_desc=None) == []
    assert [b async for b in art.trajectory_group_batches([], batch_size=2, pbar_desc=None)] == []


# batches


def numbered(n, started=None, **fields):
    async def attempt(i):
        if started is not None:
            started.append(i)
        return await rollout(i, wait=n - i, **fields)

    return [art.TrajectoryGroup([attempt(i)]) for i in range(n)]


def rewards(batches):
    return [[group[0].reward for group in batch] for batch in batches]


async def test_batches_come_in_order_and_the_last_may_be_short():
    batches = [b async for b in art.trajectory_group_batches(numbered(7), batch_size=3, pbar_desc=None)]
    assert rewards(batches) == [[0, 1, 2], [3, 4, 5], [6]]
    assert not other_tasks()


async def test_skipped_batches_are_never_run():
    started = []
    batches = [
        b
        async for b in art.trajectory_group_batches(numbered(7, started), batch_size=3, skip_batches=1, pbar_desc=None)
    ]
    assert rewards(batches) == [[3, 4, 5], [6]]
    assert sorted(started) == [3, 4, 5, 6]


async def test_no_more_batches_run_at_once_than_asked():
    made = []

    def groups():
        for i in range(12):
            made.append(i)
            yield art.TrajectoryGroup([rollout(i)])

    batches = art.trajectory_group_batches(groups(), batch_size=2, max_concurrent_batches=3, pbar_desc=None)
    assert rewards([await anext(batches)]) == [[0, 1]]
    assert len(made) == 6
    assert rewards([await anext(batches)]) == [[2, 3]]
    assert len(made) == 8
    await batches.aclose()
    assert not other_tasks()


async def test_leaving_the_iteration_cancels_what_runs():
    log = []

    async def first():
        return art.TrajectoryGroup([art.Trajectory()])

    def groups():
        yield first()
        yield art.TrajectoryGroup([forever(log)])

    batches = art.trajectory_group_batches(groups(), batch_size=1, pbar_desc=None)
    async for _ in batches:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        break
    await batches.aclose()
    assert log == ["cancelled"]
    assert not other_tasks()


async def test_exceptions_are_counted_per_batch():
    def groups():
        return [art.TrajectoryGroup([rollout(i), rollout(error=ValueError(i))]) for i in range(4)]

    kept = [
        b async for b in art.trajectory_group_batches(groups(), batch_size=2, max_batch_exceptions=2, pbar_desc=None)
    ]
    assert [len(b) for b in kept] == [2, 2]
    with pytest.raises(art.RolloutsFailed):
        async for _ in art.trajectory_group_batches(groups(), batch_size=2, max_batch_exceptions=1, pbar_desc=None):
            pass
    assert not other_tasks()


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": 1, "max_concurrent_batches": 0}])
async def test_batches_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="at least"):
        async for _ in art.trajectory_group_batches([], **wrong):
            pass


# groups by themselves


async def test_awaiting_a_group_runs_it():
    pending = art.TrajectoryGroup([rollout(1), rollout(2)], metadata={"a": 1}, exceptions=[ValueError("before")])
    group = await pending
    assert [t.reward for t in group] == [1, 2]
    assert group.metadata == {"a": 1}
    assert group.exceptions == [RolloutError.of(ValueError("before"))]
