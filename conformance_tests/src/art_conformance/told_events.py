"""A job's whole answer, held line by line against the wire: its fields, its numbers and its counts.

Knows the messages of `art_engine_kit.training_wire`; knows no worker, and nothing of what is trained. In which order
events come is for another check.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from art_engine_kit.training_wire import (
    GradientStep,
    JobEnded,
    JobFailed,
    JobProgress,
    JobSaved,
    JobStarted,
    TrainEvent,
)

_EVENT: TypeAdapter[TrainEvent] = TypeAdapter(TrainEvent)


def read_whole_answer(lines: Sequence[bytes]) -> list[TrainEvent]:
    """The events of a job that has ended. Fails, naming the line, where one isn't as the wire has it, and where the
    counts of several don't agree.
    """
    events = [_read(line) for line in lines]
    assert events, "the answer is empty"
    ends = [event for event in events if isinstance(event, JobEnded | JobFailed)]
    assert ends == events[-1:], f"a job has one end, and these were told: {ends}"
    for kind in (JobStarted, JobSaved):
        told = sum(isinstance(event, kind) for event in events)
        assert told == 1 or (told == 0 and isinstance(ends[0], JobFailed)), f"{kind.__name__} was told {told} times"
    if isinstance(ends[0], JobEnded):
        _check_counts(events, ends[0])
    else:
        assert not any(isinstance(event, JobSaved) for event in events), "a job that failed says that it was saved"
    return events


def _read(line: bytes) -> TrainEvent:
    # Strict, so that a number that is sent as text is none.
    event = _EVENT.validate_json(line, strict=True)
    unknown = json.loads(line).keys() - type(event).model_fields.keys()
    assert not unknown, f"{sorted(unknown)} is no field of the wire's {type(event).__name__}: {line.decode()}"
    for name, value in event.model_dump().items():
        for number in value.values() if isinstance(value, dict) else [value]:
            assert not isinstance(number, float) or math.isfinite(number), f"{name} is not finite: {line.decode()}"
            assert not isinstance(number, int) or number >= 0, f"{name} is below 0: {line.decode()}"
    return event


def _check_counts(events: Sequence[Any], ended: JobEnded) -> None:
    started = next(event for event in events if isinstance(event, JobStarted))
    rows = [event for event in events if isinstance(event, JobProgress)]
    done = [event.done for event in rows]
    assert {event.total for event in rows} <= {started.num_rows}, f"{started.num_rows} rows, of which: {rows}"
    assert max(done, default=0) == started.num_rows, f"of {started.num_rows} rows these are done at the end: {done}"
    steps = [event for event in events if isinstance(event, GradientStep)]
    assert {event.total for event in steps} <= {len(steps)}, f"{len(steps)} gradient steps were told: {steps}"
    assert ended.metrics["data/step_num_gradient_steps"] == len(steps), f"{len(steps)} gradient steps: {ended}"
