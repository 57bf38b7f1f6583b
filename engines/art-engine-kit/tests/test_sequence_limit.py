"""What is said of trajectories that are longer than a step trains on."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat.chat_completion import Choice

from art_core import History, Trajectory, TrajectoryGroup
from art_engine_kit.sequence_limit import SequenceLimit, check_lengths, known_lengths


@pytest.mark.parametrize(
    ("packed", "longest", "context", "tokens", "because"),
    [
        (10, 20, 30, 10, "packed_sequence_length=10"),
        (20, 20, 30, 20, "max_seq_length=20"),
        (None, 20, 30, 20, "max_seq_length=20"),
        (None, 40, 30, 30, "the base model's context of 30 tokens"),
        (35, 40, 30, 30, "the base model's context of 30 tokens"),
        (None, 40, None, 40, "max_seq_length=40"),
    ],
)
def test_the_smallest_limit_is_the_one_that_is_named(
    packed: int | None, longest: int, context: int | None, tokens: int, because: str
) -> None:
    limit = SequenceLimit.of(packed, longest, context)
    assert (limit.tokens, limit.because) == (tokens, because)


def test_a_row_longer_than_a_sequence_may_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"packed_sequence_length is 21 and max_seq_length 20.*Lower the one or raise"):
        SequenceLimit.of(21, 20)


@pytest.mark.parametrize("lengths", [[], [10], [1, 10, 3]])
def test_a_limit_that_leaves_out_none_is_not_spoken_of(lengths: list[int]) -> None:
    assert check_lengths(lengths, SequenceLimit.of(10, 20)) == ""


def test_a_limit_that_leaves_out_some_is_told_with_what_to_raise() -> None:
    assert check_lengths([5, 11, 300], SequenceLimit.of(10, 20)) == (
        "2 of 3 trajectories are longer than packed_sequence_length=10 and are left out; the longest has 300 tokens. To"
        " train on them raise packed_sequence_length."
    )


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (SequenceLimit.of(3, 20), r"packed_sequence_length=3 leaves out every .* \(2 of 2; the longest has 41 tokens"),
        (SequenceLimit.of(None, 20), "nothing would be trained. To train on them raise max_seq_length in _internal_"),
        (SequenceLimit.of(None, 20, 8), "the base model's context of 8 tokens leaves out .* take a base model"),
    ],
)
def test_a_limit_that_leaves_out_all_is_an_error(limit: SequenceLimit, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_lengths([40, 41], limit)


def choice(prompt: Any, ids: Any) -> Choice:
    message = {"role": "assistant", "content": "a"}
    return Choice.model_validate(
        {"finish_reason": "stop", "index": 0, "message": message, "prompt_token_ids": prompt, "token_ids": ids}
    )


def test_lengths_are_known_by_the_token_ids_of_the_choices() -> None:
    several = Trajectory(
        messages_and_choices=[choice([1] * 4, [2, 3]), choice([1] * 9, [2])],
        additional_histories=[History(messages_and_choices=[choice([1] * 20, [2])])],
    )
    silent = Trajectory(messages_and_choices=[{"role": "user", "content": "?"}])
    one = Trajectory(messages_and_choices=[choice([1], [2])])
    assert known_lengths([TrajectoryGroup([several, silent]), TrajectoryGroup([one])]) == [21, 2]
    assert known_lengths([]) == []


@pytest.mark.parametrize(("prompt", "ids"), [(None, [1]), ([1], None), (3, [1])])
def test_lengths_that_only_a_tokenizer_knows_are_not_known(prompt: Any, ids: Any) -> None:
    known = Trajectory(messages_and_choices=[choice([1], [2])])
    assert known_lengths([TrajectoryGroup([known, Trajectory(messages_and_choices=[choice(prompt, ids)])])]) is None
