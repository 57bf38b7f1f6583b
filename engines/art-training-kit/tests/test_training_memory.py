"""A step that doesn't fit into memory is tried once more in shorter rows, or ends in words; the worker goes on."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from art_core.errors import TrainingFailed
from art_engine_kit.sequence_limit import known_lengths
from art_engine_kit.training_wire import JobEnded, JobStarted
from art_training_kit.trainer import Trainer

Make = Callable[..., Any]


def run(trainer: Trainer, job: Any) -> dict[str, float]:
    """Run a job to its end and give its metrics."""
    ended = list(trainer.run(job))[-1]
    assert isinstance(ended, JobEnded)
    return ended.metrics


WORDS = "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines"


@pytest.fixture
def cramped(small_policy: Make) -> Make:
    """A policy whose memory ends at so many tokens of a row, and the lengths of the rows that it saw."""

    def make(limit: int, error: Exception) -> tuple[Any, list[int]]:
        policy = small_policy()
        plain, seen = policy.hidden_states, list[int]()

        def hidden_states(row: Any) -> torch.Tensor:
            seen.append(len(row))
            if len(row) > limit:
                raise error
            return plain(row)

        policy.hidden_states = hidden_states
        return policy, seen

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(WORDS),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
    ids=["GPU", "CPU"],
)
def test_rows_half_as_long_are_tried_and_the_step_is_the_same(
    error: Exception, cramped: Make, small_policy: Make, job: Make, checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy, seen = cramped(140, error)
    with caplog.at_level(logging.WARNING):
        events = list(Trainer(policy).run(job(1, packed_sequence_length=240)))
    starts = [event.num_rows for event in events if isinstance(event, JobStarted)]
    assert len(starts) == 2
    assert starts[1] > starts[0]
    assert max(seen) > 140, "nothing was too long: it shows nothing"
    assert "ran out of memory" in caplog.text
    ended = events[-1]
    assert isinstance(ended, JobEnded)
    shutil.rmtree(checkpoints / "0001")
    wanted = run(Trainer(small_policy()), job(1, packed_sequence_length=120, grad_accumulation_sequences=2))
    assert ended.metrics["loss/train"] == pytest.approx(wanted["loss/train"], rel=1e-5)
    assert ended.metrics["loss/grad_norm"] == pytest.approx(wanted["loss/grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_what_does_not_fit_either_way_ends_in_words_and_the_next_job_works(
    cramped: Make, job: Make, checkpoints: Path
) -> None:
    policy, seen = cramped(1, torch.OutOfMemoryError(WORDS))
    trainer = Trainer(policy)
    with pytest.raises(TrainingFailed) as told:
        run(trainer, job(1, packed_sequence_length=240))
    said = str(told.value)
    for words in (
        "step 1 of",
        "cpu",
        "float32",
        "Tried to allocate 2.00 GiB",
        "packed_sequence_length",
        "still served",
    ):
        assert words in said
    assert "More lines" not in said
    assert len(seen) >= 2, "it wasn't tried again"
    assert not (checkpoints / "0001").exists()
    del policy.hidden_states
    assert run(trainer, job(1))["data/step_num_gradient_steps"] >= 1


@pytest.mark.slow
def test_rows_that_cannot_be_shorter_are_not_tried_again(cramped: Make, job: Make, make_groups: Make) -> None:
    policy, seen = cramped(1, torch.OutOfMemoryError(WORDS))
    longest = max(known_lengths(make_groups(1)) or [])
    with pytest.raises(TrainingFailed, match="can't be shorter: the longest sequence has"):
        run(Trainer(policy), job(1, packed_sequence_length=longest))
    assert len(seen) == 1


def test_another_error_is_not_taken_for_it(cramped: Make, job: Make) -> None:
    policy, seen = cramped(1, RuntimeError("shapes don't fit"))
    with pytest.raises(RuntimeError, match="shapes don't fit"):
        run(Trainer(policy), job(1))
    assert len(seen) == 1
