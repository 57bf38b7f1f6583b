"""The longest sequence that a step trains on, which setting says so, and what to say of the trajectories beyond it.

A limit that leaves out all of them is an error, before anything starts where the lengths are known; one that leaves out
some is told. Knows lengths in tokens; knows no trajectory's content.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from art_core import TrajectoryGroup


@dataclass(frozen=True)
class SequenceLimit:
    """`tokens` is the most that a sequence may have, `because` what sets it and `todo` what to do about it."""

    tokens: int
    because: str
    todo: str

    @classmethod
    def of(cls, packed_sequence_length: int | None, max_seq_length: int, context: int | None = None) -> SequenceLimit:
        """The smallest of what `train` was told, of the model's setting, and of what the base model takes (None where
        that isn't known). Raises ValueError for a packed row that is longer than the longest sequence may be.
        """
        if packed_sequence_length is not None and packed_sequence_length > max_seq_length:
            raise ValueError(
                f"packed_sequence_length is {packed_sequence_length} and max_seq_length {max_seq_length}: a packed row"
                " cannot be longer than the longest sequence. Lower the one or raise the other."
            )
        told = f"max_seq_length={max_seq_length}"
        limits = [cls(max_seq_length, told, "raise max_seq_length in _internal_config")]
        if packed_sequence_length is not None:
            told = f"packed_sequence_length={packed_sequence_length}"
            limits.append(cls(packed_sequence_length, told, "raise packed_sequence_length"))
        if context is not None:
            known = f"the base model's context of {context} tokens"
            limits.append(cls(context, known, "take a base model with a longer one, or keep the rollouts shorter"))
        return min(limits, key=lambda limit: limit.tokens)

    def problem(self, lengths: Sequence[int]) -> str:
        """What to say of trajectories whose longest sequences have these lengths; empty when none is too long."""
        beyond = sum(length > self.tokens for length in lengths)
        if not beyond:
            return ""
        longest = f"the longest has {max(lengths)} tokens"
        if beyond == len(lengths):
            return (
                f"{self.because} leaves out every trajectory of the step ({beyond} of {len(lengths)}; {longest}, the"
                f" shortest {min(lengths)}), so nothing would be trained. To train on them {self.todo}."
            )
        return (
            f"{beyond} of {len(lengths)} trajectories are longer than {self.because} and are left out; {longest}. To"
            f" train on them {self.todo}."
        )


def check_lengths(lengths: Sequence[int], limit: SequenceLimit) -> str:
    """What to warn of, empty for nothing. Raises ValueError when the limit leaves out every trajectory."""
    problem = limit.problem(lengths)
    if problem and min(lengths) > limit.tokens:
        raise ValueError(problem)
    return problem


def known_lengths(groups: Iterable[TrajectoryGroup]) -> list[int] | None:
    """The length of the longest sequence of each trajectory in which something was sampled, by the token ids of its
    choices; None when there is one whose length is not known before it is tokenized.
    """
    lengths = []
    for group in groups:
        for trajectory in group:
            longest = 0
            for history in trajectory.histories():
                for choice in history.choices():
                    try:
                        longest = max(longest, len(choice.prompt_token_ids) + len(choice.token_ids))  # type: ignore[attr-defined]
                    except (AttributeError, TypeError):
                        return None
            if longest:
                lengths.append(longest)
    return lengths
