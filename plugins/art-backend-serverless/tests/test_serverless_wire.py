"""The messages of the wire: nothing of a group is lost on it, and what nobody reads is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

import art_core.trajectories as t
from art_backend_serverless import wire


def test_a_group_comes_back_as_it_was_sent() -> None:
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": "hello"},
        "logprobs": {"content": [{"token": "hello", "logprob": -0.5, "top_logprobs": []}], "refusal": None},
        "token_ids": [7, 8],
    }
    items: list[Any] = [{"role": "user", "content": "hi"}, choice]
    trajectory = t.Trajectory(
        messages_and_choices=items,
        additional_histories=[t.History(messages_and_choices=items)],
        reward=0.5,
        initial_policy_version=1,
        final_policy_version=2,
        metrics={"right": 1},
        metadata={"case": "a"},
    )
    group = t.TrajectoryGroup([trajectory], exceptions=[ValueError("no answer")])
    sent = wire.CreateTrainingJob(model_id="m", trajectory_groups=wire.groups_as_json([group]))
    read = wire.CreateTrainingJob.model_validate(json.loads(sent.model_dump_json()))
    [back] = wire.groups_from_json(read.trajectory_groups)
    assert back.for_logging() == group.for_logging()
    assert back[0].choices()[0].model_dump()["token_ids"] == [7, 8]


def test_a_field_that_nobody_reads_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="learning_rat\n"):
        wire.ExperimentalConfig.model_validate({"learning_rat": 1e-5})


def test_an_answer_may_grow() -> None:
    assert wire.Job.model_validate({"id": "j", "created_at": "now"}) == wire.Job(id="j")
