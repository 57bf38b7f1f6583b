"""A real training worker whose answers break off, are refused, late or garbled: each job ends with its checkpoint or
with an error in words, no checkpoint is half there, and the next job works.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from art_backend_local.servers.training_worker import TrainingWorker
from art_conformance.live_worker import seeded_start
from art_conformance.oracle import oracle_for
from art_conformance.training_data import make_groups
from art_conformance.training_steps import step_job, step_launch
from art_core.errors import TrainingFailed
from art_engine_kit.checkpoint_folder import read_manifest, whole_steps
from art_engine_kit.training_wire import JobEnded
from art_engine_torch.training_engine import TorchTrainingEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
ERRING = Path(__file__).with_name("erring_worker.py")
# What the worker does to its answer, and whether the job can end well all the same.
FAULTS = {
    "500": False,
    "503": False,
    "late at progress": True,
    "garbled at progress": False,
    "garbled at saved": False,
    "cut at gradient_step": False,
    "cut at ended": False,
}


class ErringEngine(TorchTrainingEngine):
    """The torch engine, whose worker errs as `file` says."""

    def __init__(self, file):
        self.file = file

    def launch(self, config):
        plan = super().launch(config)
        python, _, _, *words = plan.argv
        return replace(plan, argv=(python, str(ERRING), str(self.file), *words))


async def outcome(worker, job):
    """The last event of a job, or the error that it ended with."""
    await worker.settled()
    await worker.ensure_running()
    try:
        return [event async for event in worker.run(job)][-1]
    except TrainingFailed as error:
        return error


async def test_a_job_whose_worker_errs_is_done_or_refused_in_words(base, tmp_path):
    file = tmp_path / "fault"
    start = seeded_start(tmp_path / "run", base)
    groups = make_groups(oracle_for(base), start)
    worker = TrainingWorker(ErringEngine(file), step_launch("torch", base), log_file=tmp_path / "worker.log")
    faults = list(FAULTS)
    random.Random(0).shuffle(faults)
    step = 0
    try:
        for fault in faults:
            steps = whole_steps(start.parent)
            job = step_job(steps[max(steps)], groups, tmp_path / "run", step := max(steps) + 1)
            file.write_text(fault, encoding="utf-8")
            last = await outcome(worker, job)
            assert isinstance(last, JobEnded if FAULTS[fault] else TrainingFailed), (fault, last)
            assert FAULTS[fault] or "the training worker" in str(last), last
            await worker.settled()
            if job.destination.exists():
                read_manifest(job.destination, hashes=True)
            file.write_text("", encoding="utf-8")
            steps = whole_steps(start.parent)
            after = step_job(steps[max(steps)], groups, tmp_path / "run", step := max(steps) + 1)
            assert isinstance(await outcome(worker, after), JobEnded), fault
            assert not list(start.parent.glob(".*")), f"something was left half there after {fault}"
    finally:
        await worker.close()
    assert max(whole_steps(start.parent)) == step
