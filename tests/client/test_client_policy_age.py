"""A trained step says by how many steps its tokens were older than what it was trained from, in the plain loop too."""

from __future__ import annotations

import pytest
from openai.types.chat.chat_completion import Choice

import art
from art.policy_age import AGE

TRAINED = {"data/step_num_gradient_steps": 1.0}


def attempt(version: int | None, tokens: int = 2) -> art.Trajectory:
    said = {} if version is None else {"policy_version": version}
    choice = Choice.model_validate(
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "a"},
            "token_ids": list(range(tokens)),
            **said,
        }
    )
    return art.Trajectory(messages_and_choices=[{"role": "user", "content": "q"}, choice], reward=0.0)


async def age_of(logged, model, groups, step, split="train", metrics=TRAINED):
    await model.log(groups, metrics=metrics, step=step, split=split)
    return logged[-1].get(AGE)


async def test_tokens_count_by_the_policy_that_sampled_them(model, logged):
    fresh = [art.TrajectoryGroup([attempt(4), attempt(4)])]
    assert await age_of(logged, model, fresh, 5) == 0.0
    assert await age_of(logged, model, fresh, 7) == 2.0
    mixed = [art.TrajectoryGroup([attempt(4, tokens=1), attempt(2, tokens=3)])]
    assert await age_of(logged, model, mixed, 5) == pytest.approx(3 * 2 / 4)


async def test_it_is_said_of_trained_steps_alone_and_only_where_it_is_known(model, logged):
    groups = [art.TrajectoryGroup([attempt(4), attempt(4)])]
    assert await age_of(logged, model, groups, 5, metrics={"mine": 1}) is None
    assert await age_of(logged, model, groups, 5, split="val") is None
    assert await age_of(logged, model, [art.TrajectoryGroup([attempt(None)])], 5) is None
    assert await age_of(logged, model, groups, 5, metrics={**TRAINED, AGE: 9.0}) == 9.0
