from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from art_core.errors import InvalidTrajectory
from art_core.trajectories import History, Trajectory, TrajectoryGroup
from art_engine_kit.altered_sampling import ALTERED, sampled_otherwise
from art_engine_kit.group_records import record_of
from art_engine_kit.groups_file import read_groups, read_records, write_groups
from art_training_kit.chat_template import ChatTemplate
from art_training_kit.rows import TokenizedStep
from art_training_kit.tokenize import tokenize_groups

Make = Callable[..., Any]


def tokenize(*rewarded: tuple[Trajectory, float], **options: Any) -> TokenizedStep:
    for trajectory, reward in rewarded:
        trajectory.reward = reward
    group = TrajectoryGroup([trajectory for trajectory, _ in rewarded])
    return tokenize_groups([record_of(group)], **({"vocabulary_size": 100, "max_length": 50} | options))


def trajectory(*items: Any, **fields: Any) -> Trajectory:
    return Trajectory(messages_and_choices=[{"role": "user", "content": "?"}, *items], **fields)


def test_turns_whose_prompts_continue_become_one_row(make_choice: Make) -> None:
    first, second = make_choice([1, 2], [3, 4], -1.0), make_choice([1, 2, 3, 4, 5], [6], -2.0)
    step = tokenize((trajectory(first, second), 1.0), (trajectory(make_choice([1, 2], [9])), 0.0))
    row = step.rows[0]
    assert row.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert row.trained.tolist() == [2, 3, 5]
    assert row.old_logprobs.tolist() == [-1.0, -1.0, -2.0]
    assert step.trained_tokens.tolist() == [3, 1]
    assert step.num_tokens == 9


def test_a_rewritten_past_makes_rows_of_their_own_and_loses_no_sampled_token(make_choice: Make) -> None:
    thinking = make_choice([1, 2], [50, 51, 3])
    stripped = make_choice([1, 2, 3, 4], [60, 61, 5])
    continued = make_choice([1, 2, 3, 4, 60, 61, 5, 7], [8])
    step = tokenize((trajectory(thinking, stripped, continued), 1.0), (trajectory(make_choice([1], [9])), 0.0))
    mine = [row for row in step.rows if row.trajectory == 0]
    assert [row.token_ids.tolist() for row in mine] == [[1, 2, 50, 51, 3], [1, 2, 3, 4, 60, 61, 5, 7, 8]]
    sampled = [row.token_ids[row.trained].tolist() for row in mine]
    assert sampled == [[50, 51, 3], [60, 61, 5, 8]]
    assert step.trained_tokens.tolist() == [7, 1]


def test_additional_histories_are_rows_that_share_the_trajectory(make_choice: Make, make_history: Make) -> None:
    two = trajectory(make_choice([1], [2]), additional_histories=[make_history(make_choice([7], [8, 9]))])
    step = tokenize((two, 1.0), (trajectory(make_choice([1], [3])), 0.0))
    assert [row.trajectory for row in step.rows] == [0, 0, 1]
    assert step.trained_tokens.tolist() == [3, 1]


def test_what_is_left_out_is_counted(make_choice: Make) -> None:
    one = lambda: trajectory(make_choice([1], [2]))  # noqa: E731
    step = tokenize(
        (one(), 1.0),
        (trajectory({"role": "assistant", "content": "not sampled"}), 3.0),
        (trajectory(make_choice([1] * 60, [2])), 0.0),
        (one(), 2.0),
    )
    metrics = step.metrics
    assert metrics["data/step_num_trajectories_without_choice"] == 1
    assert metrics["data/step_num_trajectories_too_long"] == 1
    assert metrics["data/step_num_trajectories_trained"] == len(step.advantages) == 2
    assert metrics["data/step_num_trajectories"] == 4
    equal = tokenize((one(), 0.1), (one(), 0.1), (one(), 0.1))
    assert not equal.rows
    assert equal.metrics["data/step_num_groups_trainable"] == 0
    assert equal.metrics["data/step_num_trajectories_zero_advantage"] == 3
    assert not tokenize_groups([record_of(TrajectoryGroup([]))], vocabulary_size=9, max_length=9).rows


def test_choices_that_were_drawn_otherwise_are_counted_or_refused_by_their_places(
    make_choice: Make, make_history: Make, tmp_path: Path
) -> None:
    def otherwise(prompt: list[int], *by: str) -> Any:
        choice = make_choice(prompt, [2])
        choice.altered_sampling = list(by)
        return choice

    def rewarded() -> list[tuple[Trajectory, float]]:
        more = [make_history(otherwise([7], "top_p"))]
        return [
            (trajectory(make_choice([1], [2])), 0.0),
            (trajectory(otherwise([1], "temperature", "top_k"), additional_histories=more), 1.0),
            # Of no use to the step, so of no harm either.
            (trajectory(otherwise([1], "min_p")), 0.5),
        ]

    step = tokenize(*rewarded())
    assert step.metrics[ALTERED] == 2
    assert "2 trained choices" in sampled_otherwise(step.metrics)
    assert not sampled_otherwise(tokenize((trajectory(make_choice([1], [2])), 1.0)).metrics)
    with pytest.raises(InvalidTrajectory, match=r"trajectories\[1\]\.messages_and_choices\[1\].*temperature, top_k"):
        tokenize(*rewarded(), refuse_altered=True)
    # As it comes to a worker.
    groups = [TrajectoryGroup([each for each, _ in rewarded()])]
    for trajectory_, (_, reward) in zip(groups[0], rewarded(), strict=True):
        trajectory_.reward = reward
    write_groups(tmp_path / "groups", groups)
    read = tokenize_groups(read_records(tmp_path / "groups"), vocabulary_size=100, max_length=50)
    assert read.metrics == step.metrics


@pytest.mark.parametrize(
    ("item", "match"),
    [
        (lambda make: make([1], [2], token_ids=None), "token_ids' is missing|token_ids is missing"),
        (lambda make: make([1], [2], prompt_token_ids=None), "prompt_token_ids is missing"),
        (lambda make: make([1], [2], None), "no logprobs"),
        (lambda make: make([], [2]), "empty prompt"),
        (lambda make: make([1], [100]), "vocabulary of 100"),
        (lambda make: make([1], [2], 0.5), "above 0"),
        (lambda make: make([1], [2], -math.inf), "infinite"),
        (lambda make: make([1], [2], math.nan), "not a number"),
    ],
)
def test_a_bad_choice_is_named_by_its_place(make_choice: Make, item: Make, match: str) -> None:
    with pytest.raises(InvalidTrajectory, match=match) as error:
        tokenize((trajectory(make_choice([1], [2])), 0.0), (trajectory(item(make_choice)), 1.0))
    assert "trajectory_groups[0].trajectories[1]" in str(error.value)


@pytest.mark.parametrize("logprob", [math.nan, -math.inf, 0.5])
def test_a_bad_logprob_is_named_by_its_choice(make_choice: Make, logprob: float) -> None:
    first, second = make_choice([1], [2, 3]), make_choice([1, 2, 3, 4], [5, 6])
    second.logprobs.content[0].logprob = logprob
    with pytest.raises(InvalidTrajectory, match=r"trajectories\[0\]\.messages_and_choices\[2\] has a logprob"):
        tokenize((trajectory(first, second), 1.0), (trajectory(make_choice([1], [2])), 0.0))


def test_what_is_no_token_id_is_named_by_its_choice(make_choice: Make) -> None:
    bad = make_choice([1], [2])
    bad.token_ids = ["two"]
    with pytest.raises(InvalidTrajectory, match=r"trajectories\[0\]\.messages_and_choices\[1\] holds what is no token"):
        tokenize((trajectory(bad), 1.0), (trajectory(make_choice([1], [2])), 0.0))


def test_ids_and_logprobs_must_be_one_for_one(make_choice: Make) -> None:
    bad = make_choice([1], [2, 3])
    bad.logprobs.content.pop()
    with pytest.raises(InvalidTrajectory, match="2 sampled token ids and 1 logprobs"):
        tokenize((trajectory(bad), 1.0), (trajectory(make_choice([1], [2])), 0.0))


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf, 1.1e150, -1e300])
def test_a_reward_that_is_not_finite_is_named(make_choice: Make, reward: float) -> None:
    with pytest.raises(InvalidTrajectory, match=r"trajectory_groups\[0\].trajectories\[1\].reward"):
        tokenize((trajectory(make_choice([1], [2])), 0.0), (trajectory(make_choice([1], [2])), reward))


def test_rewards_that_differ_by_rounding_are_counted_as_equal(make_choice: Make) -> None:
    real = TrajectoryGroup([trajectory(make_choice([1], [2]), reward=reward) for reward in (0.0, 1.0)])
    noise = TrajectoryGroup([trajectory(make_choice([1], [2]), reward=reward) for reward in (0.3, 0.1 + 0.2)])
    step = tokenize_groups([record_of(noise), record_of(real)], vocabulary_size=9, max_length=9)
    assert step.advantages.tolist() == pytest.approx([-1, 1], rel=1e-5)
    assert step.metrics["data/step_num_groups_trainable"] == 1
    assert step.metrics["data/step_num_trajectories_zero_advantage"] == 2


def test_all_that_cannot_be_trained_on_is_named_at_once(make_choice: Make) -> None:
    good = lambda: trajectory(make_choice([1], [2]))  # noqa: E731
    groups = [
        [(good(), 1.0), (trajectory(make_choice([1], [200])), 0.0), (trajectory(make_choice([], [2])), 2.0)],
        [(good(), math.nan), (good(), 1.0), (good(), math.inf)],
        [(trajectory(make_choice([1], [2], 0.5)), 1.0), (good(), 0.0)],
    ]
    for group in groups:
        for each, reward in group:
            each.reward = reward
    records = [record_of(TrajectoryGroup([each for each, _ in group])) for group in groups]
    with pytest.raises(InvalidTrajectory) as refused:
        tokenize_groups(records, vocabulary_size=100, max_length=50)
    first, *lines, todo = str(refused.value).splitlines()
    assert first == "5 values cannot be trained on:"
    assert "drop their trajectories" in todo
    places = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0)]
    for line, (g, t) in zip(lines, places, strict=True):
        assert re.match(rf"trajectory_groups\[{g}\]\.trajectories\[{t}\][. ]", line)


class Letters:
    """A tokenizer of single characters, with a template that closes each message with '.' and a line break."""

    eos_token_id = ord(".")
    chat_template = "letters"

    def apply_chat_template(self, messages: list[Any], *, add_generation_prompt: bool, **_: Any) -> str:
        text = "".join(f"{m['role'][0]}:{m['content']}.\n" for m in messages)
        return text + "a:" if add_generation_prompt else text

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_without_ids_the_template_finds_the_message_and_its_end(make_choice: Make) -> None:
    bare = lambda: trajectory(make_choice([1], [2], None, token_ids=None, prompt_token_ids=None))  # noqa: E731
    template = ChatTemplate(Letters())
    step = tokenize((bare(), 1.0), (bare(), 0.0), without_logprobs=template, vocabulary_size=128)
    row = step.rows[0]
    assert "".join(map(chr, row.token_ids)) == "u:?.\na:said."
    assert "".join(map(chr, row.token_ids[row.trained])) == "said."
    assert np.isnan(row.old_logprobs).all()


def test_known_ids_are_kept_where_only_logprobs_are_missing(make_choice: Make) -> None:
    pair = [trajectory(make_choice([1], [2], None)) for _ in range(2)]
    step = tokenize((pair[0], 1.0), (pair[1], 0.0), without_logprobs=ChatTemplate(Letters()))
    assert step.rows[0].token_ids.tolist() == [1, 2]
    assert np.isnan(step.rows[0].old_logprobs).all()


def test_a_template_that_moves_the_message_is_refused(make_choice: Make) -> None:
    class Moving(Letters):
        def apply_chat_template(self, messages: list[Any], *, add_generation_prompt: bool, **more: Any) -> str:
            text = super().apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **more)
            return text if add_generation_prompt else "!" + text

    bare = [trajectory(make_choice([1], [2], None, token_ids=None)) for _ in range(2)]
    with pytest.raises(InvalidTrajectory, match="right after its prompt"):
        tokenize((bare[0], 1.0), (bare[1], 0.0), without_logprobs=ChatTemplate(Moving()), vocabulary_size=128)


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), TypeError("can only concatenate"), UnicodeError("?")])
def test_a_template_that_raises_is_told_by_the_choice_it_was_for(make_choice: Make, error: Exception) -> None:
    class Raising(Letters):
        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            raise error

    bare = [trajectory(make_choice([1], [2], None, token_ids=None)) for _ in range(2)]
    with pytest.raises(InvalidTrajectory, match=f"{type(error).__name__}: ") as refused:
        tokenize((bare[0], 1.0), (bare[1], 0.0), without_logprobs=ChatTemplate(Raising()), vocabulary_size=128)
    for t in range(2):
        assert f"trajectory_groups[0].trajectories[{t}].messages_and_choices[1] came without" in str(refused.value)


def test_rows_survive_being_written_and_read(make_groups: Make, tmp_path: Path) -> None:
    groups = make_groups()
    groups[0].trajectories[0].additional_histories.append(History(messages_and_choices=groups[1][0].choices()))
    file = tmp_path / "step.groups"
    write_groups(file, groups)
    ways = (map(record_of, groups), map(record_of, read_groups(file)), read_records(file))
    first, *others = (tokenize_groups(way, vocabulary_size=97, max_length=99) for way in ways)
    for other in others:
        assert other.metrics == first.metrics
        np.testing.assert_array_equal(other.advantages, first.advantages)
        for a, b in zip(first.rows, other.rows, strict=True):
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            np.testing.assert_array_equal(a.trained, b.trained)
            np.testing.assert_array_equal(a.old_logprobs, b.old_logprobs)
