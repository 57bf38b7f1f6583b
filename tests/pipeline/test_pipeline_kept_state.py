"""What a pipeline keeps on disk, change by change."""

import asyncio
import sqlite3

import pytest

import art
from art.pipeline_trainer.kept_state import KeptState


def group(reward):
    return art.TrajectoryGroup([art.Trajectory(reward=reward)])


async def test_changes_at_once_are_all_made_and_one_that_fails_fails_alone(tmp_path):
    kept = KeptState(tmp_path)
    await kept.open(0, resume=True)
    await kept.finished(0, group=group(0.0))
    results = await asyncio.gather(
        *(kept.handed_out(number, 0, number + 1) for number in range(1, 60)),
        kept.finished(0, group=group(9.0)),
        *(kept.finished(number, version=2, actor_s=0.5, group=group(float(number))) for number in range(1, 30)),
        return_exceptions=True,
    )
    failed = [result for result in results if result is not None]
    assert [type(error) for error in failed] == [sqlite3.IntegrityError]
    await kept.close()
    again = KeptState(tmp_path)
    found = await again.open(2, resume=True)
    await again.close()
    assert found.handed_out == 60
    assert sorted(found.unfinished) == list(range(30, 60))
    assert {each.scenario: each.group[0].reward for each in found.groups} == {n: float(n) for n in range(30)}


async def test_a_change_to_a_file_that_was_let_go_is_refused(tmp_path):
    kept = KeptState(tmp_path)
    await kept.open(0, resume=True)
    await kept.close()
    with pytest.raises(RuntimeError):
        await kept.handed_out(0, 0, 1)


async def test_whoever_is_cancelled_while_a_change_is_written_costs_no_other_its_change(tmp_path):
    kept = KeptState(tmp_path)
    await kept.open(0, resume=True)
    writing = [asyncio.create_task(kept.handed_out(number, 0, number + 1)) for number in range(20)]
    await asyncio.sleep(0)
    for task in writing[::2]:
        task.cancel()
    results = await asyncio.gather(*writing, return_exceptions=True)
    assert [type(result).__name__ for result in results] == ["CancelledError", "NoneType"] * 10
    # The last ones were asked for and not waited for: closing writes them first.
    late = asyncio.create_task(kept.handed_out(20, 0, 21))
    await asyncio.sleep(0)
    await kept.close()
    await late
    again = KeptState(tmp_path)
    found = await again.open(0, resume=True)
    await again.close()
    assert set(range(1, 20, 2)) | {20} <= set(found.unfinished)
    assert found.handed_out == 21
