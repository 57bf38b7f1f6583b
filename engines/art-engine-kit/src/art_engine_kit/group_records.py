"""What training reads of trajectory groups: rewards, and token rows with the spans that were sampled in them.

A choice carries its prompt's token ids and its own. One whose prompt begins with all of an earlier row continues that
row, so a conversation is one row; where the template wrote the past differently, the choice begins a row of its own.
Knows trajectories; knows no file, no tokenizer and nothing of what is trained on.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from art_core import History, TrajectoryGroup
from art_core.trajectories import is_choice

from .altered_sampling import altered_by

TOKEN_ID = np.dtype("<i4")
LOGPROB = np.dtype("<f8")
NO_LOGPROBS = -1


class SampledSpan(NamedTuple):
    """The tokens of one choice in a row.

    `item` is the choice's index in its history's `messages_and_choices`, `start` the position of its first token,
    `length` their number, at least 1. `logprobs` is how many logprobs it carries, NO_LOGPROBS when it has none.
    """

    item: int
    start: int
    length: int
    logprobs: int


@dataclass(frozen=True, slots=True)
class SampledRow:
    """One token sequence as the policy saw it.

    `token_ids` has shape [length]. `logprobs` holds those of all spans, one after the other, as the engine gave them;
    one that is missing among others is NaN.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float64]
    spans: list[SampledSpan]


class UnreadChoice(NamedTuple):
    """A choice that is in no row, as `missing`, a field of token ids, isn't there, or as `fault` says."""

    item: int
    missing: str
    fault: str


class AlteredChoice(NamedTuple):
    """A choice that was drawn from other probabilities than the policy's own, and the request's fields that say so."""

    item: int
    by: str


@dataclass(frozen=True, slots=True)
class HistoryRecord:
    """One conversation. `read` gives it whole, messages and tools included."""

    rows: list[SampledRow]
    unread: list[UnreadChoice]
    altered: list[AlteredChoice]
    read: Callable[[], History]


@dataclass(frozen=True, slots=True)
class TrajectoryRecord:
    """One attempt: its reward, its own conversation and its additional ones."""

    reward: float
    histories: list[HistoryRecord]


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """Attempts at one scenario, and how many of them ended with an exception."""

    trajectories: list[TrajectoryRecord]
    exceptions: int


class Sample(NamedTuple):
    """One choice before it is in a row: its prompt's token ids and its own as the bytes of arrays of TOKEN_ID, its
    logprobs as those of an array of LOGPROB, None when it has none.
    """

    item: int
    prompt: bytes
    token_ids: bytes
    logprobs: bytes | None

    @classmethod
    def of(cls, item: int, prompt: Iterable[int], token_ids: Iterable[int], logprobs: bytes | None) -> Sample:
        """Raises TypeError or OverflowError for what is no token id."""
        return cls(item, array("i", prompt).tobytes(), array("i", token_ids).tobytes(), logprobs)


def record_of(group: TrajectoryGroup) -> GroupRecord:
    """The record of a group that is at hand; `groups_file.read_records` gives the same from a file."""
    return GroupRecord(
        [
            TrajectoryRecord(float(trajectory.reward), [_history_record(history) for history in trajectory.histories()])
            for trajectory in group
        ],
        len(group.exceptions),
    )


def _history_record(history: History) -> HistoryRecord:
    samples: list[Sample] = []
    unread: list[UnreadChoice] = []
    altered: list[AlteredChoice] = []
    for item, choice in enumerate(history.messages_and_choices):
        if not is_choice(choice):
            continue
        read = _read_choice(item, choice)
        if by := altered_by(choice):
            altered.append(AlteredChoice(item, by))
        if isinstance(read, Sample):
            samples.append(read)
        elif read is not None:
            unread.append(read)
    return HistoryRecord(join_rows(samples), unread, altered, lambda: history)


def join_rows(samples: Iterable[Sample]) -> list[SampledRow]:
    """Put the samples of one conversation into rows, each into exactly one."""
    rows: list[_OpenRow] = []
    for sample in samples:
        row = next((row for row in reversed(rows) if sample.prompt.startswith(row.token_ids)), None)
        if row is None:
            rows.append(row := _OpenRow())
        row.add(sample)
    return [row.closed() for row in rows]


@dataclass(slots=True)
class _OpenRow:
    token_ids: bytes = b""
    logprobs: list[bytes] = field(default_factory=list)
    spans: list[SampledSpan] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        start, length = (len(ids) // TOKEN_ID.itemsize for ids in (sample.prompt, sample.token_ids))
        said = sample.logprobs
        known = NO_LOGPROBS if said is None else len(said) // LOGPROB.itemsize
        self.token_ids = sample.prompt + sample.token_ids
        self.logprobs.append(said or b"")
        self.spans.append(SampledSpan(sample.item, start, length, known))

    def closed(self) -> SampledRow:
        # A bytearray, since an array over bytes cannot be written to, which torch warns of.
        ids, logprobs = bytearray(self.token_ids), bytearray(b"".join(self.logprobs))
        return SampledRow(np.frombuffer(ids, TOKEN_ID), np.frombuffer(logprobs, LOGPROB), self.spans)


def samples_of(row: SampledRow) -> Iterator[Sample]:
    """The samples that `join_rows` put into a row."""
    at = 0
    for span in row.spans:
        known = max(span.logprobs, 0)
        yield Sample(
            span.item,
            row.token_ids[: span.start].tobytes(),
            row.token_ids[span.start : span.start + span.length].tobytes(),
            None if span.logprobs == NO_LOGPROBS else row.logprobs[at : at + known].tobytes(),
        )
        at += known


def logprobs_of(choice: Any) -> bytes | None:
    """The logprobs of a choice's sampled tokens as the bytes of an array of LOGPROB, None when it carries none.

    One that is None among others is NaN. Raises AttributeError, KeyError, TypeError or ValueError for what is none.
    """
    given = getattr(choice, "logprobs", None)
    # What is put in by hand may be a dictionary in place of the openai package's object.
    fields = given if isinstance(given, dict) else vars(given) if given else {}
    entries = fields.get("content") or fields.get("refusal")
    if not entries:
        return None
    logprob = itemgetter("logprob") if isinstance(entries[0], dict) else attrgetter("logprob")
    values = list(map(logprob, entries))
    return np.array(values, dtype=LOGPROB).tobytes()


def _read_choice(item: int, choice: Any) -> Sample | UnreadChoice | None:
    """None when nothing was sampled."""
    ids, prompt = getattr(choice, "token_ids", None), getattr(choice, "prompt_token_ids", None)
    try:
        logprobs = logprobs_of(choice)
        if ids is None or prompt is None:
            return UnreadChoice(item, "token_ids" if ids is None else "prompt_token_ids", "")
        sample = Sample.of(item, prompt, ids, logprobs)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        why = str(error).encode("ascii", "backslashreplace").decode()
        return UnreadChoice(item, "", f"holds what is no token id or no logprob ({why})")
    return sample if sample.token_ids else None
