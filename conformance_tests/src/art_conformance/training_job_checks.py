"""What a job must do: train on exactly what was sampled, from the checkpoint that it names, and save what it learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from art_core import TrainingCapability, TrajectoryGroup
from art_engine_kit.canary import read_canary
from art_engine_kit.checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_manifest, seal
from art_engine_kit.training_wire import (
    AdapterWritten,
    GradientStep,
    JobEnded,
    JobFailed,
    JobProgress,
    JobSaved,
    JobStarted,
    KlReference,
    SupervisedOptions,
)

from .live_worker import JobRefused, LiveWorker, working
from .oracle import Oracle
from .requirements import MUST, check
from .serving import port_for_a_server
from .tiny_model import write_adapter
from .told_events import read_whole_answer
from .training_data import gain, make_conversations, make_groups, reply_logprobs, sampled_tokens, shared_tokens
from .training_engine_suite import (
    LOSS_TOLERANCE,
    RATE,
    TrainingEngineSuite,
    adapter_weights,
    assert_same_step,
    assert_same_weights,
)

Cap = TrainingCapability


class TrainingJobChecks(TrainingEngineSuite):
    """The checks of `TrainingEngineConformance` on what is learnt."""

    @check("TRN-101", MUST, "The worker answers its health path with 200 once the base model is loaded.", live=True)
    async def test_health(self, worker: LiveWorker) -> None:
        plan = worker.engine.launch(worker.launch)
        assert (await worker.client.get(plan.health_path)).status_code == 200

    @check("TRN-102", MUST, "A job without the token, or with a wrong one, is refused with 401.", live=True)
    async def test_token_is_needed(self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup]) -> None:
        wanted = job(groups)
        for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}):
            with pytest.raises(JobRefused) as refusal:
                async for _ in worker.events(wanted, headers=headers):
                    pass
            assert refusal.value.status == 401
        assert not wanted.destination.exists()

    @check(
        "TRN-103", MUST, "A job's events come in order: started, progress and gradient steps, saved, ended.", live=True
    )
    async def test_events(self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup]) -> None:
        wanted = job(groups)
        events = await worker.run(wanted)
        assert isinstance(events[0], JobStarted), events[0]
        assert isinstance(events[-2], JobSaved), events[-2]
        assert isinstance(events[-1], JobEnded), events[-1]
        assert events[-2].path == wanted.destination
        started, middle = events[0], events[1:-2]
        assert all(isinstance(event, JobProgress | GradientStep) for event in middle)
        done = [event.done for event in middle if isinstance(event, JobProgress)]
        assert done == sorted(done)
        steps = [event for event in middle if isinstance(event, GradientStep)]
        assert steps
        assert [event.index for event in steps] == list(range(steps[0].total))
        assert started.num_sequences > 0
        assert started.trained_tokens == sampled_tokens(groups)
        for name in ("loss/train", "loss/grad_norm", "loss/learning_rate", "data/step_num_gradient_steps"):
            assert np.isfinite(events[-1].metrics.get(name, np.nan)), f"{name} is {events[-1].metrics.get(name)}"
        assert events[-1].metrics["loss/grad_norm"] > 0
        assert events[-1].metrics["loss/learning_rate"] == pytest.approx(RATE)

    @check(
        "TRN-104",
        MUST,
        "The saved checkpoint is whole, finite, of the start's rank and modules, and PEFT loads it.",
        live=True,
    )
    async def test_checkpoint(
        self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup], start: Path, oracle: Oracle
    ) -> None:
        wanted = job(groups)
        await worker.train(wanted)
        manifest = read_manifest(wanted.destination, hashes=True)
        assert manifest.step == 1
        assert {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= manifest.files.keys()
        before, after = adapter_weights(start), adapter_weights(wanted.destination)
        assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
        assert all(np.isfinite(values).all() for values in after.values())
        assert any((before[name] != after[name]).any() for name in before), "training changed nothing"
        assert np.isfinite(oracle.next_logprobs([5, 6, 7], wanted.destination)).all()
        left = [path.name for path in wanted.destination.parent.iterdir()]
        assert left == ["0001"], f"something was left beside the checkpoint: {left}"

    @check(
        "TRN-105",
        MUST,
        "The checkpoint's canary is what the oracle says of the new adapter and of the previous one.",
        live=True,
    )
    async def test_canary(
        self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup], start: Path, oracle: Oracle
    ) -> None:
        wanted = job(groups, learning_rate=1e-2)
        await worker.train(wanted)
        canary = read_canary(wanted.destination)
        assert canary is not None, "the checkpoint has no canary"
        assert canary.prompts
        for prompt in canary.prompts:
            assert prompt.token_ids
            now = oracle.next_logprobs(prompt.token_ids, wanted.destination)[-1]
            then = oracle.next_logprobs(prompt.token_ids, start)[-1]
            assert int(now.argmax()) in prompt.expected, "the canary lacks the most likely token"
            for token, value in prompt.expected.items():
                assert value == pytest.approx(float(now[token]), abs=0.01)
            assert prompt.previous is not None
            for token, value in prompt.previous.items():
                assert value == pytest.approx(float(then[token]), abs=0.01)

    @check("TRN-106", MUST, "A learning rate of 0 leaves the adapter as it was.", live=True)
    async def test_zero_rate(self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup], start: Path) -> None:
        wanted = job(groups, learning_rate=0.0)
        await worker.train(wanted)
        assert_same_weights(start, wanted.destination)

    @check(
        "TRN-107", MUST, "The loss of a step on policy is the contract's, over exactly the sampled tokens.", live=True
    )
    async def test_loss(
        self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup], start: Path, oracle: Oracle
    ) -> None:
        await self.assert_loss(worker, job, groups, start, oracle)

    @check(
        "TRN-108", MUST, "A trajectory of several turns is trained on all its sampled tokens and no others.", live=True
    )
    async def test_turns(self, worker: LiveWorker, job: Any, start: Path, oracle: Oracle) -> None:
        groups = make_groups(oracle, start, turns=3, seed=3)
        started, *_ = await self.assert_loss(worker, job, groups, start, oracle)
        assert isinstance(started, JobStarted)
        assert started.trained_tokens == sampled_tokens(groups)

    @check("TRN-109", MUST, "Sampled tokens are taken by their ids, whatever the text beside them reads.", live=True)
    async def test_ids_not_text(self, worker: LiveWorker, job: Any, start: Path, oracle: Oracle) -> None:
        texts = {"own": None, "other": "something else entirely, of another length"}
        jobs = [job(make_groups(oracle, start, seed=4, text=text), name=name) for name, text in texts.items()]
        assert_same_step(*[(wanted, await worker.train(wanted)) for wanted in jobs])

    @check(
        "TRN-110", MUST, "A step makes well rewarded tokens likelier and badly rewarded ones less likely.", live=True
    )
    async def test_direction(
        self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup], start: Path, oracle: Oracle
    ) -> None:
        for loss_fn in ("cispo", "ppo"):
            wanted = job(groups, name=loss_fn, loss_fn=loss_fn, learning_rate=5e-3)
            await worker.train(wanted)
            assert gain(oracle, start, wanted.destination, groups) > 0, f"{loss_fn} went the wrong way"

    @check(
        "TRN-111",
        MUST,
        "Every trained step starts from the checkpoint that its job names, whatever ran before.",
        live=True,
    )
    async def test_start_is_obeyed(self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup]) -> None:
        first, again = job(groups, name="a"), job(groups, name="b")
        one = await worker.train(first)
        assert_same_step((first, one), (again, await worker.train(again)))
        await worker.train(job(groups, step=2, name="a", start=first.destination))
        back = job(groups, step=3, name="a")
        assert_same_step((first, one), (back, await worker.train(back)))

    @check(
        *("TRN-112", MUST, "A step taken by a new worker is the one that the old worker would have taken."),
        needs=Cap.EXACT_RESUME,
        live=True,
    )
    async def test_resume(
        self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup], oracle: Oracle, tmp_path: Path
    ) -> None:
        first = job(groups, learning_rate=5e-3)
        await worker.train(first)
        follow = make_groups(oracle, first.destination, seed=8, version=1)
        undisturbed = job(follow, step=2, start=first.destination, learning_rate=5e-3)
        here = await worker.train(undisturbed)
        launch = replace(worker.launch, port=port_for_a_server())
        async with working(worker.engine, launch, tmp_path / "second.log") as second:
            resumed = job(follow, step=2, name="resumed", start=first.destination, learning_rate=5e-3)
            there = await second.train(resumed)
        assert there.metrics["loss/train"] == pytest.approx(here.metrics["loss/train"], abs=1e-5)
        assert_same_weights(undisturbed.destination, resumed.destination, within=1e-5)

    @check(
        *("TRN-113", MUST, "The KL divergence to a reference is 0 for the start itself and positive for another."),
        needs=Cap.KL_REFERENCE,
        live=True,
    )
    async def test_reference(
        self,
        worker: LiveWorker,
        job: Any,
        groups: list[TrajectoryGroup],
        start: Path,
        conformance_model: Path,
        tmp_path: Path,
    ) -> None:
        one_step = {"kl_penalty_coef": 0.1, "grad_accumulation_sequences": 1000}
        same = await worker.train(job(groups, name="same", reference=KlReference(adapter=start), **one_step))
        assert same.metrics["loss/kl_policy_ref"] == pytest.approx(0.0, abs=1e-5)
        other = write_adapter(tmp_path / "reference", conformance_model, seed=77)
        different = await worker.train(job(groups, name="other", reference=KlReference(adapter=other), **one_step))
        base = await worker.train(job(groups, name="base", reference=KlReference(), **one_step))
        assert abs(different.metrics["loss/kl_policy_ref"]) > 1e-3
        assert abs(base.metrics["loss/kl_policy_ref"]) > 1e-4

    @check("TRN-114", MUST, "A job that needs an undeclared capability fails with UnsupportedCapability.", live=True)
    async def test_undeclared_is_refused(self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup]) -> None:
        supervised = SupervisedOptions(learning_rates=[RATE])
        # All that a job can ask for; where they are declared, TRN-113 and TRN-150 hold them.
        asking = {
            Cap.KL_REFERENCE: job(groups, name="reference", reference=KlReference(), kl_penalty_coef=0.1),
            Cap.SFT: job(make_conversations(), name="supervised", supervised=supervised),
        }
        for capability, wanted in asking.items():
            if capability in worker.engine.capabilities:
                continue
            failed = await worker.failing(wanted)
            assert failed.error_type == "UnsupportedCapability", failed
            assert len(failed.message) > 10, "the failure gives no reason"
            assert not wanted.destination.parent.exists(), "something was written all the same"

    @check(
        *("TRN-115", MUST, "A prefix that trajectories share is computed once, and the loss is as if it were not."),
        needs=Cap.PREFIX_SHARING,
        live=True,
    )
    async def test_prefix_sharing(self, worker: LiveWorker, job: Any, start: Path, oracle: Oracle) -> None:
        groups = make_groups(oracle, start, turns=2, seed=5)
        started, *_ = await self.assert_loss(worker, job, groups, start, oracle)
        assert isinstance(started, JobStarted)
        every, once = shared_tokens(groups)
        assert started.packed_tokens <= once + started.num_rows * 2, f"{started.packed_tokens} of {once} ({every})"

    @check(
        "TRN-116",
        MUST,
        "When all rewards are equal the start is carried over unchanged, with 0 gradient steps.",
        live=True,
    )
    async def test_nothing_to_train(self, worker: LiveWorker, job: Any, start: Path, oracle: Oracle) -> None:
        wanted = job(make_groups(oracle, start, rewards=(1.0, 1.0, 1.0)))
        ended = await worker.train(wanted)
        assert ended.metrics["data/step_num_gradient_steps"] == 0
        assert read_manifest(wanted.destination, hashes=True).step == 1
        assert_same_weights(start, wanted.destination)

    @check(
        *(
            "TRN-150",
            MUST,
            "A supervised job trains on every token of every reply and no others, a batch a step, and saves it whole.",
        ),
        needs=Cap.SFT,
        live=True,
    )
    async def test_supervised(self, worker: LiveWorker, job: Any, start: Path, oracle: Oracle) -> None:
        batch = 2
        # At a rate of 0 the first batch moves nothing, so that the loss of each is known.
        supervised = SupervisedOptions(learning_rates=[0.0, 5e-3], batch_size=batch)
        wanted = job(make_conversations(), supervised=supervised)
        events = await worker.run(wanted)
        started, ended = events[0], events[-1]
        assert isinstance(ended, JobEnded), f"the job failed: {ended}"
        assert isinstance(started, JobStarted), started
        batches = [reply_logprobs(oracle, start, *places) for places in ((0, batch), (batch, None))]
        assert started.trained_tokens == sum(map(len, batches))
        steps = [event.metrics for event in events if isinstance(event, GradientStep)]
        assert [step["loss/learning_rate"] for step in steps] == pytest.approx(supervised.learning_rates)
        expected = [-float(np.mean(logprobs)) for logprobs in batches]
        assert [step["loss/train"] for step in steps] == pytest.approx(expected, abs=LOSS_TOLERANCE)
        assert ended.metrics["loss/train"] == pytest.approx(np.mean(expected), abs=LOSS_TOLERANCE)
        assert read_manifest(wanted.destination, hashes=True).step == 1
        after = reply_logprobs(oracle, wanted.destination, batch)
        assert np.mean(after) > np.mean(batches[-1]), "the replies that were trained on are no likelier"

    @check(
        "TRN-152",
        MUST,
        "Each line of a job's answer is an event of the wire with no other field, finite, and its counts add up.",
        live=True,
    )
    async def test_lines(
        self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup], start: Path, oracle: Oracle, tmp_path: Path
    ) -> None:
        several = {"packed_sequence_length": 128, "grad_accumulation_sequences": 1}
        equal = make_groups(oracle, start, rewards=(1.0, 1.0))
        for wanted, last in (
            (job(groups, name="several", **several), JobEnded),
            (job(equal, name="carried"), JobEnded),
            (job(groups, name="failed", start=tmp_path / "nowhere"), JobFailed),
        ):
            events = read_whole_answer([line async for line in worker.lines(wanted)])
            assert isinstance(events[-1], last), events[-1]

    @check(
        "TRN-154",
        MUST,
        "An adapter that a job tells of before it has saved is final: the checkpoint's own, and its canary's prompts.",
        live=True,
    )
    async def test_adapter_told_early(self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup]) -> None:
        wanted = job(groups, tell_written=True)

        def hashes(folder: Path) -> list[str]:
            return [seal(folder / name).sha256 for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]

        told: list[tuple[list[str], list[list[int]]]] = []
        over = False
        async for event in worker.events(wanted):
            if isinstance(event, AdapterWritten):
                assert not over, "it tells of an adapter when the checkpoint is saved"
                told.append((hashes(event.folder), event.prompts))
            assert not (told and isinstance(event, GradientStep)), "it goes on training what it said is written"
            assert not isinstance(event, JobFailed), event
            over = over or isinstance(event, JobSaved)
        canary = read_canary(wanted.destination)
        assert canary is not None, "the checkpoint has no canary"
        saved = (hashes(wanted.destination), [list(prompt.token_ids) for prompt in canary.prompts])
        assert told in ([], [saved]), "it is another adapter"
