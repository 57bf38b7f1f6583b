"""What a worker may not say of a job, a line at a time: each wrong answer is noticed, and the sound ones pass."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from art_conformance.told_events import read_whole_answer

STARTED = {"event": "started", "num_sequences": 4, "num_rows": 2, "packed_tokens": 90, "trained_tokens": 40}
ROWS = [{"event": "progress", "done": done, "total": 2} for done in (1, 2)]
STEPS = [{"event": "gradient_step", "index": i, "total": 2, "metrics": {"loss/train": -0.5}} for i in (0, 1)]
SAVED = {"event": "saved", "path": "/0001"}
ENDED = {"event": "ended", "metrics": {"data/step_num_gradient_steps": 2.0}}
FAILED = {"event": "failed", "error_type": "OSError", "message": "the disk is full", "traceback": ""}
SOUND = [STARTED, ROWS[0], STEPS[0], ROWS[1], STEPS[1], SAVED, ENDED]


def read(events: list[dict[str, Any]]) -> None:
    read_whole_answer([json.dumps(event).encode() for event in events])


def changed(place: int, **fields: Any) -> list[dict[str, Any]]:
    """The sound answer with one of its lines otherwise."""
    return [{**event, **fields} if place == here else event for here, event in enumerate(SOUND)]


def test_sound_answers_pass() -> None:
    read(SOUND)
    nothing = {**STARTED, "num_sequences": 0, "num_rows": 0, "packed_tokens": 0, "trained_tokens": 0}
    read([nothing, SAVED, {"event": "ended", "metrics": {"data/step_num_gradient_steps": 0}}])
    read([FAILED])
    read([STARTED, ROWS[0], FAILED])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([], "is empty"),
        (SOUND[:-1], "one end"),
        ([*SOUND, ENDED], "one end"),
        ([*SOUND, ROWS[1]], "one end"),
        (SOUND[1:], "JobStarted was told 0 times"),
        ([STARTED, *SOUND], "JobStarted was told 2 times"),
        ([*SOUND[:5], ENDED], "JobSaved was told 0 times"),
        ([*SOUND[:6], FAILED], "says that it was saved"),
        (changed(0, seconds=1), r"\['seconds'\] is no field"),
        (changed(6, metrics={"loss/train": float("nan"), "data/step_num_gradient_steps": 2}), "not finite"),
        (changed(2, metrics={"loss/train": float("inf")}), "not finite"),
        (changed(0, trained_tokens=-1), "trained_tokens is below 0"),
        (changed(1, total=3), "2 rows, of which"),
        (changed(0, num_rows=3), "3 rows, of which"),
        ([*SOUND[:3], *SOUND[4:]], "of 2 rows these are done"),
        (changed(4, total=3), "2 gradient steps were told"),
        ([*SOUND[:4], *SOUND[5:]], "1 gradient steps were told"),
        (changed(6, metrics={"data/step_num_gradient_steps": 1.0}), "2 gradient steps"),
    ],
)
def test_a_wrong_answer_is_noticed(answer: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        read(answer)


@pytest.mark.parametrize(
    "answer", [changed(0, num_rows="2"), changed(1, done=1.5), changed(2, metrics=None), changed(5, event="stored")]
)
def test_what_is_no_event_is_no_event(answer: list[dict[str, Any]]) -> None:
    with pytest.raises(ValidationError):
        read(answer)
