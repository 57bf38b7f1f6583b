"""The wire between backend and worker: options read or refused by name, jobs and events that come back as sent."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from art_core.errors import UnknownArgument
from art_engine_kit.train_options import TrainOptions
from art_engine_kit.training_wire import (
    AdapterOptions,
    AdapterWritten,
    GradientStep,
    JobEnded,
    JobFailed,
    JobProgress,
    JobSaved,
    JobStarted,
    KlReference,
    TrainEvent,
    TrainJob,
    read_event,
)


def test_an_unknown_option_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(UnknownArgument) as caught:
        TrainOptions.of({"learning_rat": 1e-5}, where="LocalBackend.train")
    assert "LocalBackend.train has no argument 'learning_rat'. Did you mean 'learning_rate'?" in str(caught.value)
    assert caught.value.name == "learning_rat"
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1e-5),
        ("learning_rate", math.nan),
        ("learning_rate", "fast"),
        ("loss_fn", "grpo"),
        ("kl_penalty_coef", -0.1),
        ("kl_penalty_reference_step", -1),
        ("epsilon", -0.1),
        ("epsilon", math.inf),
        ("epsilon_high", math.nan),
        ("advantage_balance", 1.5),
        ("importance_sampling_level", "word"),
        ("max_negative_advantage_importance_sampling_weight", 0),
        ("truncated_importance_sampling", math.inf),
        ("kimi_k2_tau", math.nan),
        ("num_trajectories_learning_rate_multiplier_power", math.inf),
        ("packed_sequence_length", 0),
        ("grad_accumulation_sequences", 0),
        ("save_checkpoint", "perhaps"),
    ],
)
def test_a_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^LocalBackend\.train: {name}: "):
        TrainOptions.of({name: value}, where="LocalBackend.train")


def test_two_kl_references_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="there is one reference policy"):
        TrainOptions.of({"kl_penalty_reference_step": 1, "kl_ref_adapter_path": "/adapter"}, where="LocalBackend.train")


def test_options_are_frozen_and_defaulted() -> None:
    options = TrainOptions.of({"loss_fn": "ppo"}, where="train")
    assert (options.loss_fn, options.learning_rate, options.save_checkpoint) == ("ppo", 5e-6, True)
    with pytest.raises(ValidationError):
        options.learning_rate = 1.0


def test_a_job_survives_the_wire() -> None:
    job = TrainJob(
        model="p/a",
        step=3,
        start=Path("/c/0002"),
        destination=Path("/c/0003"),
        groups_file=Path("/step.groups"),
        reference=KlReference(adapter=Path("/c/0000")),
        options=TrainOptions(kl_penalty_coef=0.1, kl_penalty_reference_step=0, kimi_k2_tau=0.5),
        adapter=AdapterOptions(peft_args={"r": 8}, chat_template="{{ messages }}"),
    )
    assert TrainJob.model_validate_json(job.model_dump_json()) == job


@pytest.mark.parametrize(
    "change",
    [
        {"step": 0},
        {"kind": "sft"},
        {"optons": {}},
        {"start": None},
        {"reference": {"step": 1}},
        {"options": {"kl_penalty_coef": 0.1}},
    ],
)
def test_a_malformed_job_is_refused(change: dict[str, Any]) -> None:
    job = {"model": "p/a", "step": 1, "start": "/0", "destination": "/1", "groups_file": "/g"}
    TrainJob.model_validate(job)
    with pytest.raises(ValidationError):
        TrainJob.model_validate(job | change)


EVENTS: list[TrainEvent] = [
    JobStarted(num_sequences=8, num_rows=2, packed_tokens=100, trained_tokens=40),
    JobProgress(done=1, total=2),
    GradientStep(index=1, total=1, metrics={"loss/train": 0.5, "loss/kl_div": math.inf}),
    AdapterWritten(folder=Path("/c/.saving-0003"), prompts=[[1, 2], [3]]),
    JobSaved(path=Path("/c/0003")),
    JobEnded(metrics={"loss/train": -math.inf}),
    JobFailed(error_type="OutOfMemory", message="48 GiB\nasked", traceback='File "x"'),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.event)
def test_each_event_is_one_line_and_comes_back(event: TrainEvent) -> None:
    line = event.model_dump_json()
    assert "\n" not in line
    assert read_event(line) == event
    assert read_event(line.encode()) == event


def test_a_loss_that_is_not_a_number_crosses_the_wire() -> None:
    back = read_event(JobEnded(metrics={"loss/train": math.nan}).model_dump_json())
    assert isinstance(back, JobEnded)
    assert math.isnan(back.metrics["loss/train"])


@pytest.mark.parametrize("line", ["", "{}", json.dumps({"event": "finished"}), "not json"])
def test_what_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(ValidationError):
        read_event(line)
