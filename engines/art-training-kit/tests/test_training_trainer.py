"""Whole jobs on a small real policy: packed against one sequence at a time, exact resume, options, faults."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from art_core.errors import AdapterMismatch, CorruptCheckpoint, InvalidTrajectory, TrainingFailed, UnknownArgument
from art_engine_kit.canary import read_canary
from art_engine_kit.checkpoint_folder import read_manifest
from art_engine_kit.group_records import record_of
from art_engine_kit.train_options import TrainOptions
from art_engine_kit.training_wire import (
    AdapterWritten,
    JobEnded,
    JobSaved,
    JobStarted,
    KlReference,
    TrainJob,
)
from art_training_kit.advantages import balance_step
from art_training_kit.cancellation import JobCancelled
from art_training_kit.losses import Entries, policy_loss
from art_training_kit.optimizer import AdapterOptimizer
from art_training_kit.packing import pack_rows
from art_training_kit.row_tensors import RowTensors
from art_training_kit.tokenize import tokenize_groups
from art_training_kit.trainer import Trainer

Make = Callable[..., Any]


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".safetensors"}


def run(trainer: Trainer, job: TrainJob) -> dict[str, float]:
    events = list(trainer.run(job))
    assert isinstance(events[-1], JobEnded)
    return events[-1].metrics


@pytest.mark.parametrize("capacity", [10_000, 60])
def test_packed_loss_and_gradients_equal_one_sequence_at_a_time(
    small_policy: Make, make_groups: Make, job: Make, capacity: int
) -> None:
    policy = small_policy()
    run(Trainer(policy), job(1))  # so that B is not zero
    step = tokenize_groups(map(record_of, make_groups(5, turns=3)), vocabulary_size=97, max_length=200)
    advantages, weights = balance_step(step.advantages, step.trained_tokens, 0.3)
    packed = pack_rows(step.rows, max(capacity, max(map(len, step.rows))))
    assert sum(map(len, packed)) < 0.8 * step.num_tokens
    parameters = list(policy.adapter_parameters().values())
    for options in (
        TrainOptions(),
        TrainOptions(
            loss_fn="ppo", importance_sampling_level="geometric_average", kimi_k2_tau=0.1, mask_prob_ratio=True
        ),
        TrainOptions(importance_sampling_level="sequence", truncated_importance_sampling=1.1),
    ):
        losses = [RowTensors.of(row, advantages, weights, policy.device).loss(policy, options)[0] for row in packed]
        together = sum(loss.loss for loss in losses)
        ours = torch.autograd.grad(together, parameters)
        plain = torch.zeros(())
        for row in step.rows:
            (single,) = pack_rows([row], len(row))
            hidden = policy.hidden_states(single)
            logprobs = torch.log_softmax(hidden @ policy.output_weight.T, -1)[
                torch.from_numpy(row.trained).long() - 1, torch.from_numpy(row.token_ids[row.trained]).long()
            ]
            n, t = len(row.trained), row.trajectory
            entries = Entries(
                torch.from_numpy(row.old_logprobs), torch.full((n,), advantages[t], dtype=torch.float32),
                torch.full((n,), weights[t], dtype=torch.float32), torch.zeros(n, dtype=torch.long),
            )  # fmt: skip
            plain = plain + policy_loss(logprobs, entries, options).loss
        expected = torch.autograd.grad(plain, parameters)
        assert float(together.detach()) == pytest.approx(float(plain.detach()), rel=1e-4, abs=1e-4)
        for got, want in zip(ours, expected, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4 * float(want.abs().max()) + 1e-6)


def test_resumed_from_disk_equals_undisturbed_bit_for_bit(small_policy: Make, job: Make, checkpoints: Path) -> None:
    policy = small_policy()
    trainer = Trainer(policy)
    undisturbed = [run(trainer, job(step)) for step in (1, 2, 3)]
    assert policy.loads == 1
    kept = files(checkpoints / "0003")
    shutil.rmtree(checkpoints / "0003")
    resumed = run(Trainer(small_policy()), job(3))
    assert files(checkpoints / "0003") == kept
    assert resumed["loss/train"] == undisturbed[2]["loss/train"]
    assert resumed["loss/grad_norm"] == undisturbed[2]["loss/grad_norm"]


def test_a_lost_optimizer_state_would_be_noticed(small_policy: Make, job: Make, checkpoints: Path) -> None:
    trainer = Trainer(small_policy())
    for step in (1, 2, 3):
        run(trainer, job(step))
    kept = files(checkpoints / "0003")
    shutil.rmtree(checkpoints / "0003")
    (checkpoints / "0002" / "optimizer.state").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"optimizer\.state"):
        run(Trainer(small_policy()), job(3))
    assert kept


def test_the_checkpoint_is_whole_and_its_canary_tells_old_from_new(
    small_policy: Make, job: Make, checkpoints: Path
) -> None:
    policy = small_policy()
    metrics = run(Trainer(policy), job(1))
    manifest = read_manifest(checkpoints / "0001", hashes=True)
    assert manifest.engine == "small"
    assert manifest.metrics == metrics
    canary = read_canary(checkpoints / "0001")
    assert canary is not None
    assert 1 <= len(canary.prompts) <= 10
    for prompt in canary.prompts:
        row = pack_rows([_probe(prompt.token_ids)], 500)[0]
        for folder, said in (("0001", prompt.expected), ("0000", prompt.previous)):
            policy.load_adapter(checkpoints / folder)
            with torch.no_grad():
                logprobs = torch.log_softmax(policy.hidden_states(row)[-1] @ policy.output_weight.T, -1)
            assert said is not None
            for token, logprob in said.items():
                assert float(logprobs[token]) == pytest.approx(logprob, abs=1e-5)
        assert max(abs(prompt.expected[t] - (prompt.previous or {})[t]) for t in prompt.expected) > 1e-3
    # They go on one from another, so that what they share is computed once.
    (row,) = pack_rows([_probe(prompt.token_ids) for prompt in canary.prompts], 500)
    assert len(row) < sum(len(prompt.token_ids) for prompt in canary.prompts) / 2


def _probe(ids: list[int]) -> Any:
    from art_training_kit.rows import TokenRow

    return TokenRow(np.array([*ids, 0], np.int32), np.array([len(ids)], np.int32), np.zeros(1, np.float32), 0)


def test_events_and_metrics_of_a_step(small_policy: Make, job: Make) -> None:
    events = list(Trainer(small_policy()).run(job(1, packed_sequence_length=60, grad_accumulation_sequences=2)))
    started = events[0]
    assert isinstance(started, JobStarted)
    assert started.num_rows > 2
    kinds = [event.event for event in events]
    steps = -(-started.num_rows // 2)
    assert kinds.count("progress") == started.num_rows
    assert kinds.count("gradient_step") == steps
    assert kinds[-2:] == ["saved", "ended"]
    metrics = events[-1].metrics
    assert metrics["data/step_num_gradient_steps"] == steps
    assert metrics["data/step_trained_tokens"] == started.trained_tokens
    assert metrics["data/step_packed_tokens"] == started.packed_tokens < metrics["data/step_trainer_tokens"]
    for name in ("loss/train", "loss/entropy", "loss/kl_div", "loss/grad_norm", "loss/learning_rate"):
        assert np.isfinite(metrics[name])


def test_accumulating_all_rows_equals_one_row(small_policy: Make, job: Make, checkpoints: Path) -> None:
    adapters = []
    for options in ({"packed_sequence_length": 60, "grad_accumulation_sequences": 99}, {}):
        metrics = run(Trainer(small_policy()), job(1, **options))
        adapters.append((checkpoints / "0001", metrics["loss/train"], metrics["loss/grad_norm"]))
        shutil.rmtree(checkpoints / "0001")
    assert adapters[0][1:] == pytest.approx(adapters[1][1:], rel=1e-4)


def test_nothing_to_train_carries_the_checkpoint(
    small_policy: Make, job: Make, make_groups: Make, checkpoints: Path
) -> None:
    policy = small_policy()
    trainer = Trainer(policy)
    run(trainer, job(1))
    equal = make_groups(2)
    for group in equal:
        for trajectory in group:
            trajectory.reward = 0.25
    for step, groups in ((2, equal), (3, [])):
        metrics = run(trainer, job(step, groups=groups))
        assert metrics["data/step_num_gradient_steps"] == 0
        assert files(checkpoints / f"{step:04d}") == files(checkpoints / "0001")
        assert read_manifest(checkpoints / f"{step:04d}", hashes=True).step == step
    run(trainer, job(4))
    assert policy.loads == 1
    kept = files(checkpoints / "0004")
    shutil.rmtree(checkpoints / "0004")
    run(Trainer(small_policy()), job(4))
    assert files(checkpoints / "0004") == kept


def test_identical_policies_have_divergence_zero(small_policy: Make, job: Make, checkpoints: Path) -> None:
    run(Trainer(small_policy()), job(1))
    same = {
        "reference": KlReference(adapter=checkpoints / "0001"),
        "kl_penalty_coef": 0.1,
        "precalculate_logprobs": True,
    }
    metrics = run(Trainer(small_policy()), job(2, **same))
    assert abs(metrics["loss/kl_policy_ref"]) < 1e-6
    assert abs(metrics["loss/kl_div"]) < 1e-6
    shutil.rmtree(checkpoints / "0002")
    against_base = run(Trainer(small_policy()), job(2, reference=KlReference(), kl_penalty_coef=0.1))
    assert abs(against_base["loss/kl_policy_ref"]) > 1e-6


@pytest.mark.parametrize(
    "change",
    [
        {"loss_fn": "ppo"},
        {"normalize_advantages": False},
        {"scale_rewards": False},
        {"kl_penalty_coef": 5.0, "reference": KlReference()},
        {"epsilon": 0.01, "epsilon_high": 0.01},
        {"advantage_balance": 0.7},
        {"importance_sampling_level": "sequence"},
        {"importance_sampling_level": "average"},
        {"importance_sampling_level": "geometric_average"},
        {"max_negative_advantage_importance_sampling_weight": 0.2},
        {"mask_prob_ratio": True, "epsilon": 0.1, "epsilon_high": 0.1},
        {"kimi_k2_tau": 0.5},
        {"precalculate_logprobs": True},
        {"truncated_importance_sampling": 0.5},
        {"packed_sequence_length": 60},
        {"grad_accumulation_sequences": 2, "packed_sequence_length": 60},
        {"num_trajectories_learning_rate_multiplier_power": 0.5},
        {"learning_rate": 2e-2},
    ],
    ids=lambda change: "+".join(change),
)
def test_every_option_changes_what_is_learnt(
    small_policy: Make, job: Make, make_groups: Make, checkpoints: Path, change: Any
) -> None:
    # Uneven spreads, so that scaling by the standard deviation matters.
    groups = make_groups(1)
    for g, group in enumerate(groups):
        for trajectory in group:
            trajectory.reward *= 1 + 3 * g
    loose = {"max_grad_norm": 1e9}
    # AdamW's first step hardly depends on a gradient's size; its second does, so a step is taken before.
    run(Trainer(small_policy()), job(1, adapter={"trainer_args": loose}))
    outcomes = []
    for options in ({}, change):
        run(Trainer(small_policy()), job(2, groups=groups, adapter={"trainer_args": loose}, **options))
        outcomes.append(files(checkpoints / "0002"))
        shutil.rmtree(checkpoints / "0002")
    assert outcomes[0] != outcomes[1]


def test_learning_rate_multiplier_counts_trajectories(small_policy: Make, job: Make) -> None:
    metrics = run(Trainer(small_policy()), job(1, num_trajectories_learning_rate_multiplier_power=1.0))
    assert metrics["loss/learning_rate"] == pytest.approx(1e-2 * metrics["data/step_num_trajectories_trained"])


@pytest.mark.slow
def test_plot_is_written_beside_the_checkpoints(small_policy: Make, job: Make, checkpoints: Path) -> None:
    run(Trainer(small_policy()), job(1, plot_tensors=True))
    assert (checkpoints.parent / "plots" / "step-0001.png").read_bytes().startswith(b"\x89PNG")


def test_settings_are_read_or_refused_by_name(small_policy: Make, job: Make) -> None:
    trainer = Trainer(small_policy())
    with pytest.raises(UnknownArgument, match=r"weight_decai.*weight_decay"):
        run(trainer, job(1, adapter={"trainer_args": {"weight_decai": 1}}))
    with pytest.raises(UnknownArgument, match="rank"):
        run(trainer, job(1, adapter={"peft_args": {"rank": 3}}))
    with pytest.raises(AdapterMismatch, match="r=16"):
        run(trainer, job(1, adapter={"peft_args": {"r": 16}}))
    with pytest.raises(AdapterMismatch, match="use_rslora=True"):
        run(trainer, job(1, adapter={"peft_args": {"use_rslora": True}}))
    with pytest.raises(AdapterMismatch, match="target_modules"):
        run(trainer, job(1, adapter={"peft_args": {"target_modules": ["q", "v"]}}))
    with pytest.raises(ValueError, match="packed_sequence_length is 100"):
        run(trainer, job(1, packed_sequence_length=100, adapter={"max_seq_length": 50}))
    run(
        trainer,
        job(
            1,
            adapter={
                "peft_args": {"r": 3, "random_state": 1, "target_modules": ["v", "k", "q"]},
                "trainer_args": {"weight_decay": 0.0},
            },
        ),
    )


def test_too_long_trajectories_are_left_out_whole_and_counted(
    small_policy: Make, job: Make, make_groups: Make, caplog: pytest.LogCaptureFixture
) -> None:
    groups = make_groups(1)
    longest = max(len(c.prompt_token_ids) + len(c.token_ids) for g in groups for t in g for c in t.choices())
    with caplog.at_level("WARNING"):
        metrics = run(Trainer(small_policy()), job(1, groups=groups, packed_sequence_length=longest - 1))
    assert metrics["data/step_num_trajectories_too_long"] >= 1
    assert f"trajectories are longer than packed_sequence_length={longest - 1} and are left out" in caplog.text
    assert f"the longest has {longest} tokens. To train on them raise packed_sequence_length" in caplog.text


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"packed_sequence_length": 3}, "packed_sequence_length=3 leaves out every trajectory of the step"),
        ({"adapter": {"max_seq_length": 5}}, "max_seq_length=5 leaves out every trajectory of the step"),
    ],
)
def test_a_limit_that_leaves_out_every_trajectory_stops_the_step(
    small_policy: Make, job: Make, checkpoints: Path, told: Any, words: str
) -> None:
    policy = small_policy()
    with pytest.raises(ValueError, match=words):
        run(Trainer(policy), job(1, **told))
    assert policy.loads == 0
    assert not (checkpoints / "0001").exists()


@pytest.mark.parametrize("learning_rate", [1e3, 1e6, 1e30])
def test_a_step_that_diverged_says_so_with_its_learning_rate_and_gradient(
    small_policy: Make, job: Make, checkpoints: Path, learning_rate: float
) -> None:
    def policy() -> Any:
        made = small_policy()
        made.squash = torch.nn.Identity()  # as in a real model, what comes out of a layer has no bound
        return made

    trainer = Trainer(policy())
    expected = run(Trainer(policy()), job(1))
    shutil.rmtree(checkpoints / "0001")
    with pytest.raises(TrainingFailed, match=r"step 1 of project/agent diverged: ") as refused:
        run(trainer, job(1, learning_rate=learning_rate))
    assert f"Its learning rate was {learning_rate:g}, the gradient's norm " in str(refused.value)
    assert "smaller learning_rate" in str(refused.value)
    assert [path.name for path in checkpoints.iterdir()] == ["0000"]
    assert run(trainer, job(1))["loss/train"] == expected["loss/train"]


@pytest.mark.parametrize("learning_rate", [1e-6, 1e-3, 3e-2])
def test_a_large_step_that_is_none_the_worse_is_kept(
    small_policy: Make, job: Make, checkpoints: Path, learning_rate: float
) -> None:
    trainer = Trainer(small_policy())
    for step in (1, 2, 3):
        run(trainer, job(step, learning_rate=learning_rate))
    assert (checkpoints / "0003").exists()


def test_after_a_fault_nothing_is_left_and_the_next_job_is_as_if_it_had_not_been(
    small_policy: Make, job: Make, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(Trainer(small_policy()), job(1))
    expected = run(Trainer(small_policy()), job(2))
    kept = files(checkpoints / "0002")
    shutil.rmtree(checkpoints / "0002")
    trainer = Trainer(small_policy())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("art_training_kit.optimizer.save_file", full)
        with pytest.raises(OSError, match=r"the disk is full.*Free some space"):
            run(trainer, job(2))
    calls = iter([False, False, False, True])
    with pytest.raises(JobCancelled):
        list(trainer.run(job(2, packed_sequence_length=60), lambda: next(calls)))
    assert sorted(p.name for p in checkpoints.iterdir()) == ["0000", "0001"]
    assert run(trainer, job(2))["loss/train"] == expected["loss/train"]
    assert files(checkpoints / "0002") == kept


def test_gradients_that_are_not_finite_stop_the_job(small_policy: Make, job: Make, checkpoints: Path) -> None:
    policy = small_policy()
    policy.output_weight[0, 0] = float("nan")
    with pytest.raises(
        FloatingPointError, match="the step diverged: the gradient's norm is nan at a learning rate of "
    ):
        run(Trainer(policy), job(1))
    assert not (checkpoints / "0001").exists()


def test_bad_input_is_an_error_before_anything_is_loaded(small_policy: Make, job: Make, make_groups: Make) -> None:
    policy = small_policy()
    groups = make_groups(1)
    groups[1].trajectories[2].choices()[0].token_ids[0] = 5000
    with pytest.raises(InvalidTrajectory, match=r"trajectory_groups\[1\]\.trajectories\[2\]"):
        run(Trainer(policy), job(1, groups=groups))
    assert policy.loads == 0


def test_the_adapter_is_told_of_as_soon_as_it_is_written_and_is_the_one_that_is_saved(
    small_policy: Make, job: Make, checkpoints: Path
) -> None:
    told = []
    trainer = Trainer(small_policy())
    for event in trainer.run(job(1).model_copy(update={"tell_written": True})):
        if isinstance(event, AdapterWritten):
            assert not (checkpoints / "0001").exists(), "it is told of while the checkpoint is not yet there"
            told.append((event, files(event.folder)))
        if isinstance(event, JobSaved):
            assert len(told) == 1
    ((event, written),) = told
    assert set(written) == {"adapter_model.safetensors"}
    assert files(checkpoints / "0001") == written
    canary = read_canary(checkpoints / "0001")
    assert canary is not None
    assert [prompt.token_ids for prompt in canary.prompts] == event.prompts


def test_nothing_is_told_of_an_adapter_that_nobody_asked_about(small_policy: Make, job: Make) -> None:
    events = list(Trainer(small_policy()).run(job(1)))
    assert not any(isinstance(event, AdapterWritten) for event in events)


@pytest.mark.parametrize("how", ["cancelled", "left"])
def test_a_job_that_ends_after_its_adapter_was_told_of_leaves_nothing(
    small_policy: Make, job: Make, checkpoints: Path, how: str
) -> None:
    over: list[bool] = []
    trainer = Trainer(small_policy())
    events = trainer.run(job(1).model_copy(update={"tell_written": True}), lambda: bool(over))
    written = next(event for event in events if isinstance(event, AdapterWritten))
    if how == "left":
        events.close()  # type: ignore[attr-defined]
    else:
        over.append(True)
        with pytest.raises(JobCancelled):
            list(events)
    assert not written.folder.exists()
    assert [folder.name for folder in checkpoints.iterdir()] == ["0000"]
    run(trainer, job(1))
    assert read_manifest(checkpoints / "0001", hashes=True).step == 1


def test_a_disk_that_is_full_is_found_before_anybody_is_told_of_the_adapter(
    small_policy: Make, job: Make, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdapterOptimizer, "save", _full_disk)
    told = []
    with pytest.raises(OSError, match="the disk is full"):
        told.extend(Trainer(small_policy()).run(job(1).model_copy(update={"tell_written": True})))
    assert not any(isinstance(event, AdapterWritten) for event in told)
    assert [folder.name for folder in checkpoints.iterdir()] == ["0000"]


def _full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_the_engine_said_is_held_against_the_policy_before_the_step_changes_it(
    small_policy: Make, job: Make, make_groups: Make
) -> None:
    policy = small_policy()
    run(Trainer(policy), job(1))

    def moved(by: float) -> Any:
        """Groups whose logprobs are the policy's own, a few nats off."""
        groups = make_groups(2)
        for group in groups:
            for trajectory in group:
                for choice in trajectory.choices():
                    ids = [*choice.prompt_token_ids, *choice.token_ids]
                    row = pack_rows([_probe(ids[:-1])], 500)[0]
                    with torch.no_grad():
                        table = torch.log_softmax(policy.hidden_states(row) @ policy.output_weight.T, -1)
                    first = len(choice.prompt_token_ids)
                    for at, entry in enumerate(choice.logprobs.content):
                        entry.logprob = float(table[first + at - 1, ids[first + at]]) - by
        return groups

    for by in (0.0, 0.5):
        options = {"learning_rate": 0.0, "packed_sequence_length": 60}
        metrics = run(Trainer(small_policy()), job(2 if by == 0.0 else 3, groups=moved(by), **options))
        assert metrics["data/step_num_gradient_steps"] > 1
        assert metrics["loss/mismatch_mean"] == pytest.approx(by, abs=1e-4)
        assert metrics["loss/mismatch_outside"] == (1.0 if by else 0.0)
        assert metrics["loss/mismatch_kl"] == pytest.approx(np.expm1(by) - by, abs=1e-3)


def test_where_no_logprob_is_known_there_is_no_mismatch(small_policy: Make, job: Make, make_groups: Make) -> None:
    groups = make_groups(2)
    for group in groups:
        for trajectory in group:
            for choice in trajectory.choices():
                choice.logprobs = None
    metrics = run(Trainer(small_policy()), job(1, groups=groups, allow_training_without_logprobs=True))
    assert "loss/mismatch_mean" not in metrics
    assert "loss/train" in metrics
