"""What a training worker must do when a job is bad, is left, comes twice, or the worker is asked to go."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from art_core import TrajectoryGroup
from art_engine_kit.checkpoint_folder import ADAPTER_WEIGHTS, read_manifest
from art_engine_kit.training_wire import AdapterOptions, GradientStep, JobEnded, JobFailed, JobSaved

from .live_worker import JobRefused, LiveWorker
from .oracle import Oracle
from .requirements import MUST, SHOULD, check
from .training_data import make_groups
from .training_engine_suite import TrainingEngineSuite, assert_same_step, assert_same_weights

BUSY = (409, 423, 429, 503)


class TrainingFaultChecks(TrainingEngineSuite):
    """The checks of `TrainingEngineConformance` on what goes wrong."""

    @check(
        "TRN-117",
        MUST,
        "A job that cannot be done ends with 'failed' and a reason, saves nothing, and the next works.",
        live=True,
    )
    async def test_bad_jobs(
        self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup], start: Path, tmp_path: Path
    ) -> None:
        no_start = job(groups, name="no-start", start=tmp_path / "nowhere")
        cut = shutil.copytree(start, tmp_path / "cut" / "0000")
        weights = (cut / ADAPTER_WEIGHTS).read_bytes()
        (cut / ADAPTER_WEIGHTS).write_bytes(weights[: len(weights) // 2])
        cut_start = job(groups, name="cut-start", start=cut)
        no_groups = job(groups, name="no-groups")
        no_groups.groups_file.unlink()
        for wanted in (no_start, cut_start, no_groups):
            failed = await worker.failing(wanted)
            assert len(failed.message) > 10, "the failure gives no reason"
            assert not wanted.destination.exists()
        await worker.train(job(groups, name="good"))

    @check("TRN-118", MUST, "A choice without logprobs fails the job, which names the trajectory.", live=True)
    async def test_missing_logprobs(self, worker: LiveWorker, job: Any, start: Path, oracle: Oracle) -> None:
        groups = make_groups(oracle, start, seed=6)
        groups[1].trajectories[2].choices()[0].logprobs = None
        failed = await worker.failing(job(groups))
        assert "1" in failed.message
        assert "2" in failed.message
        assert "logprob" in failed.message

    @check("TRN-119", MUST, "What is not a job is refused before it begins, and an unknown option is named.", live=True)
    async def test_not_a_job(self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup]) -> None:
        good = job(groups).model_dump(mode="json")
        bad = [{**good, "options": {**good["options"], "learning_rat": 1.0}}, {**good, "surprise": 1}]
        for content, word in zip(bad, ("learning_rat", "surprise"), strict=True):
            with pytest.raises(JobRefused) as refusal:
                async for _ in worker.events(content):
                    pass
            assert 400 <= refusal.value.status < 500
            assert word in str(refusal.value)
        unknown = job(groups, name="peft", adapter=AdapterOptions(peft_args={"xq_no_such_argument": 1}))
        failed = await worker.failing(unknown)
        assert "xq_no_such_argument" in failed.message

    @check("TRN-120", MUST, "A destination that is a whole checkpoint already is never written again.", live=True)
    async def test_never_twice(self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup]) -> None:
        wanted = job(groups)
        await worker.train(wanted)
        read_manifest(wanted.destination, hashes=True)
        before = _files_below(wanted.destination.parent)
        # As one does whose connection broke before it heard that the job had ended.
        failed = await worker.failing(wanted)
        assert len(failed.message) > 10, "the failure gives no reason"
        assert _files_below(wanted.destination.parent) == before, "what was there has changed"

    @check(
        "TRN-121",
        MUST,
        "Of two jobs at once the second waits or is refused, and neither disturbs the other.",
        live=True,
    )
    async def test_two_jobs(
        self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup], start: Path, oracle: Oracle
    ) -> None:
        of = {"a": groups, "b": make_groups(oracle, start, seed=9)}
        alone = [job(of[name], name=f"{name}-alone") for name in of]
        expected = [(wanted, await worker.train(wanted)) for wanted in alone]
        both = [job(of[name], name=name) for name in of]
        outcomes = await asyncio.gather(*(worker.run(wanted) for wanted in both), return_exceptions=True)
        worked = 0
        for wanted, outcome, undisturbed in zip(both, outcomes, expected, strict=True):
            if isinstance(outcome, JobRefused):
                assert outcome.status in BUSY
                continue
            assert not isinstance(outcome, BaseException), outcome
            ended = outcome[-1]
            assert isinstance(ended, JobEnded), ended
            assert_same_step(undisturbed, (wanted, ended))
            worked += 1
        assert worked >= 1

    @check(
        "TRN-122", MUST, "A client that goes away cancels its job: nothing is saved, and the next job works.", live=True
    )
    async def test_cancel(
        self, worker: LiveWorker, job: Any, start: Path, oracle: Oracle, groups: list[TrajectoryGroup]
    ) -> None:
        # Many gradient steps, so that the job is surely under way when its client leaves.
        many = make_groups(oracle, start, copies=24, tokens=40, seed=7)
        wanted = job(many, packed_sequence_length=128, grad_accumulation_sequences=1)
        stream = worker.events(wanted)
        seen = 0
        async for event in stream:
            assert not isinstance(event, JobSaved | JobEnded | JobFailed), "the job was over before it could be left"
            seen += isinstance(event, GradientStep)
            if seen == 2:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        async with asyncio.timeout(60):
            while True:
                try:
                    await worker.train(job(groups, name="next"))
                    break
                except JobRefused as refusal:
                    if refusal.status not in BUSY:
                        raise
                    await asyncio.sleep(0.2)
        assert not wanted.destination.exists(), "a job whose client had gone was saved"
        assert not list(wanted.destination.parent.glob("*")), "it left something behind"

    @check("TRN-123", SHOULD, "The same job gives the same adapter, bit by bit.", live=True)
    async def test_deterministic(self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup]) -> None:
        both = [job(groups, name=name) for name in ("a", "b")]
        for wanted in both:
            await worker.train(wanted)
        assert_same_weights(both[0].destination, both[1].destination)

    @check("TRN-140", MUST, "The worker's log never holds its token.", live=True)
    async def test_log_holds_no_token(self, worker: LiveWorker) -> None:
        assert worker.launch.token not in worker.process.log_file.read_text(errors="replace", encoding="utf-8")

    @check("TRN-141", MUST, "On SIGTERM the worker leaves within its plan's stop_timeout_s.", live=True)
    async def test_stops(self, worker: LiveWorker) -> None:
        plan = worker.engine.launch(worker.launch)
        async with asyncio.timeout(plan.stop_timeout_s + 30):
            ended = await worker.process.stop()
        assert ended.code not in (-9, 137), f"it had to be killed after {plan.stop_timeout_s:g} s: {ended.last_lines}"


def _files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
