"""What `model.log` says of a step's time, for groups that were gathered."""

import pickle
from types import SimpleNamespace

import pytest
from openai.types.chat.chat_completion import Choice

import art


@pytest.fixture
def clock(monkeypatch):
    """What the clock shows; rollouts and tests move it."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("art.step_clock.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def model(tmp_path):
    return art.TrainableModel(name="agent", project="p", base_model="b", base_path=str(tmp_path))


async def sampled(clock, *, seconds):
    """Two groups whose rollouts take these seconds together, with 40 sampled tokens."""

    async def rollout():
        clock.now += seconds / 4
        choice = Choice.model_validate(
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "x"}}
            | {"token_ids": list(range(10))}
        )
        return art.Trajectory(messages_and_choices=[{"role": "user", "content": "?"}, choice], reward=1)

    return await art.gather_trajectory_groups(
        (art.TrajectoryGroup(rollout() for _ in range(2)) for _ in range(2)), pbar_desc=None
    )


def of_time(metrics):
    return {name: value for name, value in metrics.items() if name.startswith(("time/", "throughput/"))}


async def test_a_training_step_says_where_its_seconds_went(model, clock, logged):
    for trainer_s in (3.0, 1.0):
        groups = await sampled(clock, seconds=4)
        clock.now += 6
        metrics = {"time/step_trainer_s": trainer_s, "data/step_trainer_tokens": 600.0}
        await model.log(groups, metrics=metrics, step=1, split="train")
    first, second = map(of_time, logged)
    assert first == {
        "time/wall_clock_sec": 10, "time/step_wall_s": 10, "time/step_actor_s": 4, "time/step_trainer_s": 3,
        "throughput/step_actor_idle_s": 6, "throughput/step_trainer_idle_s": 7,
        "throughput/avg_actor_tok_per_s": 10, "throughput/avg_trainer_tok_per_s": 200,
    }  # fmt: skip
    assert second == {**first, "time/wall_clock_sec": 20, "time/step_trainer_s": 1} | {
        "throughput/step_trainer_idle_s": 9, "throughput/avg_trainer_tok_per_s": 300,
    }  # fmt: skip


async def test_an_evaluation_has_one_time_and_is_no_training_step(model, clock, logged):
    await model.log(await sampled(clock, seconds=4), step=1, split="train")
    await model.log(await sampled(clock, seconds=8), step=1, split="val")
    await model.log(await sampled(clock, seconds=4), step=2, split="train")
    _, evaluation, step = map(of_time, logged)
    assert evaluation == {"time/step_eval_s": 8}
    assert (step["time/step_wall_s"], step["throughput/step_actor_idle_s"]) == (12, 8)
    assert "throughput/step_trainer_idle_s" not in step


async def test_what_the_caller_says_of_time_wins(model, clock, logged):
    await model.log(await sampled(clock, seconds=4), metrics={"time/step_actor_s": 9.0}, step=1, split="train")
    assert logged[0]["time/step_actor_s"] == 9


async def test_groups_that_were_not_gathered_have_no_time(model, clock, logged):
    await model.log([art.TrajectoryGroup([art.Trajectory(reward=1)])], step=1, split="train")
    assert of_time(logged[0]) == {}


async def test_when_a_group_was_gathered_is_no_part_of_it(clock):
    (group, _) = await sampled(clock, seconds=4)
    again = art.TrajectoryGroup.model_validate(group.for_logging())
    assert again.for_logging() == group.for_logging()
    assert pickle.loads(pickle.dumps(group)).for_logging() == group.for_logging()
