"""Supervised jobs on a small real policy, held against one conversation at a time and AdamW by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from art_core.errors import InvalidTrajectory
from art_core.trajectories import Trajectory, TrajectoryGroup
from art_engine_kit.checkpoint_folder import ADAPTER_WEIGHTS, OPTIMIZER_STATE, read_manifest
from art_engine_kit.groups_file import write_groups
from art_engine_kit.train_options import TrainOptions
from art_engine_kit.training_wire import (
    AdapterOptions,
    GradientStep,
    JobEnded,
    JobStarted,
    KlReference,
    SupervisedOptions,
    TrainEvent,
    TrainJob,
)
from art_training_kit.packing import pack_rows
from art_training_kit.rows import TokenRow
from art_training_kit.trainer import Trainer

Make = Callable[..., Any]


class Letters:
    """A tokenizer of one token a character, and a template of one line a message."""

    chat_template = "{{ 'user' 'assistant' 'system' }}"
    eos_token_id = 1

    def apply_chat_template(
        self, conversation: list[Any], tools: Any = None, tokenize: bool = True, add_generation_prompt: bool = False
    ) -> str:
        lines = [f"{message['role'][0]}:{message['content']}|" for message in conversation]
        return "".join(lines) + ("a:" if add_generation_prompt else "")

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        ids = [1 if character == "|" else ord(character) % 90 + 2 for character in text]
        return {"input_ids": ids, "offset_mapping": [(at, at + 1) for at in range(len(text))]}


def talk(*said: str) -> Trajectory:
    roles = ("user", "assistant")
    messages: list[Any] = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    return Trajectory(messages_and_choices=messages)


TALKS = [
    talk("add 1 to 1", "two"),
    talk("add 1 to 1", "it is two", "and 1 more", "three"),
    talk("name a colour", "green"),
    talk("name a colour", "red", "another", "blue"),
    talk("hello", "hello to you"),
]


@pytest.fixture
def policy(small_policy: Make) -> Any:
    made = small_policy()
    made.tokenizer = Letters()
    return made


@pytest.fixture
def job(checkpoints: Path) -> Make:
    def make(step: int = 1, talks: Any = None, rates: Any = (1e-2,), batch_size: int = 2, **fields: Any) -> TrainJob:
        file = checkpoints.parent / f"talks-{step}"
        write_groups(file, [TrajectoryGroup(TALKS if talks is None else talks)])
        return TrainJob(
            model="project/agent", step=step,
            start=checkpoints / f"{step - 1:04d}", destination=checkpoints / f"{step:04d}",
            groups_file=file,
            supervised=SupervisedOptions(learning_rates=list(rates), batch_size=batch_size), **fields,
        )  # fmt: skip

    return make


def run(trainer: Trainer, job: TrainJob) -> tuple[list[TrainEvent], dict[str, float]]:
    events = list(trainer.run(job))
    assert isinstance(events[-1], JobEnded)
    return events, events[-1].metrics


def by_hand(policy: Any, start: Path, rates: list[float], batch_size: int) -> tuple[dict[str, Any], list[float]]:
    """The adapter after one pass over TALKS and the loss of each batch, one conversation at a time."""
    policy.load_adapter(start)
    parameters = policy.adapter_parameters()
    adamw = torch.optim.AdamW(parameters.values(), betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    for index, rate in enumerate(rates):
        lost: list[torch.Tensor] = []
        for one in TALKS[index * batch_size : (index + 1) * batch_size]:
            ids, replies = [], []
            for message in one.messages():
                line = Letters()(f"{message['role'][0]}:{message['content']}|")["input_ids"]
                if message["role"] == "assistant":
                    replies += range(len(ids) + 2, len(ids) + len(line))
                ids += line
            row = TokenRow(np.array(ids, np.int32), np.array(replies, np.int32), np.zeros(len(replies), np.float32), 0)
            (packed,) = pack_rows([row], len(ids))
            logits = policy.hidden_states(packed) @ policy.output_weight.T
            lost.append(
                torch.nn.functional.cross_entropy(
                    logits[[at - 1 for at in replies]], torch.tensor([ids[at] for at in replies]), reduction="none"
                )
            )
        loss = torch.cat(lost).mean()
        losses.append(float(loss.detach()))
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
    return {name: value.detach().clone() for name, value in parameters.items()}, losses


@pytest.mark.parametrize("length", [None, 60])
def test_batches_equal_one_conversation_at_a_time_by_stock_adamw(policy: Any, job: Make, length: int | None) -> None:
    rates = [1e-2, 5e-3, 1e-3]
    made = job(rates=rates, options=TrainOptions(packed_sequence_length=length))
    adapter, losses = by_hand(policy, made.start, rates, 2)
    events, metrics = run(Trainer(policy), made)
    steps = [event.metrics for event in events if isinstance(event, GradientStep)]
    assert [step["loss/train"] for step in steps] == pytest.approx(losses, abs=1e-5)
    assert [step["loss/learning_rate"] for step in steps] == rates
    saved = load_file(made.destination / ADAPTER_WEIGHTS)
    for name, value in adapter.items():
        assert torch.allclose(saved[name], value, atol=1e-5), name
    assert metrics["data/step_num_trajectories"] == 5
    assert metrics["data/step_num_gradient_steps"] == 3
    assert metrics["loss/train"] == pytest.approx(sum(losses) / 3, abs=1e-5)


def test_what_conversations_begin_with_alike_is_computed_once(policy: Any, job: Make) -> None:
    started = next(event for event in run(Trainer(policy), job(batch_size=5))[0] if isinstance(event, JobStarted))
    assert started.packed_tokens < 0.9 * sum(
        len(f"{m['role'][0]}:{m['content']}|") for one in TALKS for m in one.messages()
    )
    said = [m["content"] for one in TALKS for m in one.messages() if m["role"] == "assistant"]
    assert started.trained_tokens == sum(len(text) + 1 for text in said)


def test_the_optimizer_goes_on_after_its_own_kind_and_starts_anew_after_the_other(
    policy: Any, job: Make, make_groups: Make
) -> None:
    def steps_taken(folder: Path) -> set[float]:
        state = load_file(folder / OPTIMIZER_STATE)
        return {float(value) for name, value in state.items() if name.endswith(".step")}

    def rewarded(step: int) -> TrainJob:
        made: TrainJob = job(step)
        write_groups(made.groups_file, make_groups(step))
        return made.model_copy(update={"supervised": None, "options": TrainOptions(grad_accumulation_sequences=100)})

    trainer = Trainer(policy)
    for step, made, taken in ((1, job(1), 3), (2, job(2), 6), (3, rewarded(3), 1), (4, rewarded(4), 2), (5, job(5), 3)):
        run(trainer, made)
        assert steps_taken(made.destination) == {taken}, step
        read_manifest(made.destination, hashes=True)
    assert policy.loads == 3  # what was held was kept where the kind stayed


def test_a_checkpoint_resumed_by_another_worker_is_as_if_nothing_had_stopped(
    policy: Any, small_policy: Make, job: Make, tmp_path: Path
) -> None:
    trainer = Trainer(policy)
    run(trainer, job(1))
    second = job(2)
    other = small_policy()
    other.tokenizer = Letters()
    elsewhere = second.model_copy(update={"destination": tmp_path / "elsewhere" / "0002"})
    elsewhere.destination.parent.mkdir()
    run(trainer, second)
    run(Trainer(other), elsewhere)
    assert (second.destination / ADAPTER_WEIGHTS).read_bytes() == (elsewhere.destination / ADAPTER_WEIGHTS).read_bytes()


def test_what_is_too_long_is_left_out_of_its_batch_and_counted(policy: Any, job: Make) -> None:
    talks = [talk("hello", "x" * 100), *TALKS[:3]]
    events, metrics = run(
        Trainer(policy), job(talks=talks, rates=[1e-2, 2e-2], adapter=AdapterOptions(max_seq_length=80))
    )
    assert metrics["data/step_num_dropped_trajectories"] == 1
    assert metrics["data/step_num_gradient_steps"] == 2
    assert [e.metrics["loss/learning_rate"] for e in events if isinstance(e, GradientStep)] == [1e-2, 2e-2]


def test_a_step_without_any_reply_carries_its_start_over(policy: Any, job: Make) -> None:
    made = job(talks=[talk("nobody answers")])
    _, metrics = run(Trainer(policy), made)
    assert metrics["data/step_num_gradient_steps"] == 0
    assert (made.destination / ADAPTER_WEIGHTS).read_bytes() == (made.start / ADAPTER_WEIGHTS).read_bytes()


def test_rates_must_be_one_or_one_a_batch(policy: Any, job: Make) -> None:
    made = job(rates=[1e-2, 1e-3])
    with pytest.raises(ValueError, match="2 rates and the trajectories make 3 batches"):
        run(Trainer(policy), made)
    assert not made.destination.exists()


def test_a_conversation_that_cannot_be_written_is_named(policy: Any, job: Make) -> None:
    bad = Trajectory(messages_and_choices=[{"role": "assistant", "content": "to nobody"}])
    with pytest.raises(InvalidTrajectory, match=r"trajectory_groups\[0\]\.trajectories\[1\].*reply to nothing"):
        run(Trainer(policy), job(talks=[TALKS[0], bad]))


def test_a_job_with_options_that_nothing_would_read_is_refused_by_their_names(job: Make) -> None:
    with pytest.raises(ValueError, match="no use for loss_fn, reference"):
        job(options=TrainOptions(loss_fn="ppo", packed_sequence_length=60), reference=KlReference())
    sent = job(options=TrainOptions(packed_sequence_length=60))
    assert TrainJob.model_validate_json(sent.model_dump_json()) == sent
