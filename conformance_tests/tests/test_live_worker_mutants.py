"""For the checks of a running training worker, a worker that breaks each: the torch engine's, spoiled in one place.

A mutant changes the job before the sound worker sees it, what the worker says, or what it saved.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from art_conformance import TrainingEngineConformance, training_job_checks
from art_conformance.live_worker import LiveWorker, save_start, start_worker
from art_conformance.oracle import oracle_for
from art_conformance.requirements import checks_of
from art_conformance.serving import port_for_a_server
from art_conformance.spoiled import not_a_number, reseal
from art_conformance.tiny_model import change_adapter, write_adapter
from art_conformance.training_data import make_groups
from art_core import ArtError, TrainingLaunch, installed_plugins
from art_core.registry import instantiate
from art_engine_kit.canary import CANARY
from art_engine_kit.checkpoint_folder import MANIFEST, read_manifest
from art_engine_kit.groups_file import read_groups, write_groups
from art_engine_kit.training_wire import GradientStep, JobEnded, JobFailed, JobSaved, JobStarted, TrainEvent, TrainJob

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.asyncio(loop_scope="module")]
TOKEN = "token-mutants-0123456789"
Events = list[TrainEvent]


@dataclass
class Spoiled(LiveWorker):
    """A worker of which one thing is wrong."""

    before: Callable[[TrainJob], TrainJob] = lambda job: job
    events_become: Callable[[Events, TrainJob], Events] = lambda events, job: events
    after: Callable[[TrainJob], None] = lambda job: None

    async def events(self, job: Any, **settings: Any) -> AsyncIterator[TrainEvent]:
        asked = self.before(job.model_copy(deep=True)) if isinstance(job, TrainJob) else job
        events = [event async for event in super().events(asked, **settings)]
        if isinstance(job, TrainJob):
            if job.destination.exists():
                self.after(job)
            events = self.events_become(events, job)
        for event in events:
            yield event


def _options(**changes: Any) -> Callable[[TrainJob], TrainJob]:
    def before(job: TrainJob) -> TrainJob:
        return job.model_copy(update={"options": job.options.model_copy(update=changes)})

    return before


def _groups(change: Callable[[Any], None]) -> Callable[[TrainJob], TrainJob]:
    """Change every trajectory before the worker reads it."""

    def before(job: TrainJob) -> TrainJob:
        groups = read_groups(job.groups_file)
        for group in groups:
            for trajectory in group:
                change(trajectory)
        changed = job.groups_file.with_suffix(".changed")
        write_groups(changed, groups)
        return job.model_copy(update={"groups_file": changed})

    return before


def _drop_last_token(trajectory: Any) -> None:
    for choice in trajectory.choices():
        choice.token_ids = choice.token_ids[:-1]
        choice.logprobs.content = choice.logprobs.content[:-1]


def _only_last_turn(trajectory: Any) -> None:
    """Sampled answers before the last one become plain messages, which nothing trains on."""
    items = trajectory.messages_and_choices
    for position, item in enumerate(items[:-1]):
        if not isinstance(item, dict):
            items[position] = {"role": "assistant", "content": item.message.content}


def _by_text(trajectory: Any) -> None:
    """Take as many tokens as the text has letters, as one who tokenizes it again would get other tokens."""
    for choice in trajectory.choices():
        ids = [3 + ord(letter) % 200 for letter in choice.message.content][: len(choice.token_ids)]
        choice.token_ids = (ids + choice.token_ids)[: len(choice.token_ids)]


def _reversed_rewards(trajectory: Any) -> None:
    trajectory.reward = -trajectory.reward


def _metrics(**changes: Callable[[float], float]) -> Callable[[Events, TrainJob], Events]:
    def become(events: Events, job: TrainJob) -> Events:
        last = events[-1]
        if not isinstance(last, JobEnded):
            return events
        changed = {
            name.replace("__", "/"): change(last.metrics.get(name.replace("__", "/"), 0.0))
            for name, change in changes.items()
        }
        return [*events[:-1], last.model_copy(update={"metrics": {**last.metrics, **changed}})]

    return become


def _moved(job: TrainJob) -> None:
    """The saved weights move a little, and the manifest agrees."""
    manifest = read_manifest(job.destination)

    def change(tensors: dict[str, Any]) -> None:
        for values in tensors.values():
            values += 1e-3 * (1 + job.step)

    change_adapter(job.destination, change)
    reseal(job.destination, manifest)


def _other_canary(job: TrainJob) -> None:
    file = job.destination / CANARY
    canary = json.loads(file.read_text())
    for prompt in canary["prompts"]:
        prompt["expected"] = {token: value - 0.5 for token, value in prompt["expected"].items()}
    manifest = read_manifest(job.destination)
    file.write_text(json.dumps(canary))
    reseal(job.destination, manifest)


def _stale_state(job: TrainJob) -> TrainJob:
    """The second worker forgets the optimizer's state."""
    if job.destination.parents[1].name != "resumed":
        return job
    start = job.destination.parents[1] / "forgetful" / job.start.name
    if not start.exists():
        shutil.copytree(job.start, start)
        manifest = json.loads((start / MANIFEST).read_text())
        for name in list(manifest["files"]):
            if name.startswith("optimizer"):
                (start / name).unlink()
                del manifest["files"][name]
        (start / MANIFEST).write_text(json.dumps(manifest))
    return job.model_copy(update={"start": start})


def _drifting_start(worker: Any) -> Callable[[TrainJob], TrainJob]:
    """Trains on from whatever came out last."""
    last: list[Path] = []

    def before(job: TrainJob) -> TrainJob:
        changed = job.model_copy(update={"start": last[-1]}) if last else job
        last.append(job.destination)
        return changed

    return before


def _swallow(events: Events, job: TrainJob) -> Events:
    return [e for e in events if not isinstance(e, GradientStep)]


def _never_fails(events: Events, job: TrainJob) -> Events:
    if isinstance(events[-1], JobFailed):
        return [*events[:-1], JobSaved(path=job.destination), JobEnded(metrics={})]
    return events


def _silent_failure(events: Events, job: TrainJob) -> Events:
    if isinstance(events[-1], JobFailed):
        return [*events[:-1], events[-1].model_copy(update={"message": "failed"})]
    return events


def _no_sharing(events: Events, job: TrainJob) -> Events:
    return [
        e.model_copy(update={"packed_tokens": e.packed_tokens * 3}) if isinstance(e, JobStarted) else e for e in events
    ]


MUTANTS: dict[str, dict[str, Any]] = {
    "TRN-103": {"events_become": _swallow},
    "TRN-104": {"after": lambda job: not_a_number(job.destination, job.start)},
    "TRN-105": {"after": _other_canary},
    "TRN-106": {"after": _moved},
    "TRN-107": {"before": _groups(_drop_last_token)},
    "TRN-108": {"before": _groups(_only_last_turn)},
    "TRN-109": {"before": _groups(_by_text)},
    "TRN-110": {"before": _groups(_reversed_rewards)},
    "TRN-111": {"before": None},
    "TRN-112": {"before": _stale_state},
    "TRN-113": {"events_become": _metrics(loss__kl_policy_ref=lambda value: 0.0)},
    "TRN-115": {"events_become": _no_sharing},
    "TRN-116": {"after": _moved},
    "TRN-117": {"events_become": _silent_failure},
    "TRN-118": {"before": _options(allow_training_without_logprobs=True)},
    "TRN-120": {"events_become": _never_fails},
    "TRN-121": {"events_become": _metrics(loss__train=lambda value: value + 0.1)},
}
WITHOUT_MUTANT = {
    "TRN-101": "the plain health of a worker; without it no check runs",
    "TRN-102": "needs a worker that asks for no token",
    "TRN-114": "applies to an engine that declares less than torch does",
    "TRN-119": "needs a worker that takes anything",
    "TRN-122": "needs a worker that goes on without its client",
    "TRN-123": "a SHOULD; needs a worker that is not deterministic",
    "TRN-140": "needs a worker that logs its token",
    "TRN-141": "needs a worker that ignores SIGTERM",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(tmp_path_factory: pytest.TempPathFactory, own_tiny_model: Path) -> AsyncIterator[LiveWorker]:
    launch = TrainingLaunch(
        base_model=own_tiny_model,
        host="127.0.0.1",
        port=port_for_a_server(),
        token=TOKEN,
        python=sys.executable,
        dtype="float32",
        max_seq_length=1024,
    )
    engine = instantiate(installed_plugins().training_engine("torch"))
    live = await start_worker(engine, launch, tmp_path_factory.mktemp("mutants") / "worker.log")
    yield live
    await live.close()


@pytest.fixture(scope="module")
def start(own_tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    adapter = write_adapter(root / "adapter", own_tiny_model, seed=21, strength=0.2)
    return save_start(root / "checkpoints" / "0000", adapter, step=0, base_model=own_tiny_model)


async def run_check(id: str, worker: LiveWorker, start: Path, tmp_path: Path) -> None:
    """Call the method that checks `id` with what its parameters ask for."""
    name = next(name for name, _, requirement in checks_of(TrainingEngineConformance) if requirement.id == id)
    suite = TrainingEngineConformance()
    method = getattr(suite, name)
    oracle = oracle_for(worker.launch.base_model)
    make_job: Any = inspect.getattr_static(TrainingEngineConformance, "job")
    there = {
        "worker": worker,
        "oracle": oracle,
        "start": start,
        "groups": make_groups(oracle, start),
        "conformance_model": worker.launch.base_model,
        "tmp_path": tmp_path,
        "job": make_job.__wrapped__(suite, tmp_path, start),
    }
    await method(**{parameter: there[parameter] for parameter in inspect.signature(method).parameters})


def spoil(worker: LiveWorker, changes: dict[str, Any]) -> Spoiled:
    given = {**changes}
    if "before" in given and given["before"] is None:
        given["before"] = _drifting_start(worker)
    return Spoiled(worker.engine, worker.launch, worker.process, worker.client, **given)


@pytest.mark.parametrize("id", MUTANTS)
async def test_the_check_notices(id: str, worker: LiveWorker, start: Path, tmp_path: Path, monkeypatch: Any) -> None:
    if id == "TRN-112":
        real = training_job_checks.working

        @asynccontextmanager
        async def forgetful(*arguments: Any) -> AsyncIterator[LiveWorker]:
            async with real(*arguments) as second:
                yield spoil(second, MUTANTS[id])

        monkeypatch.setattr(training_job_checks, "working", forgetful)
    with pytest.raises((AssertionError, ArtError, pytest.fail.Exception)):
        await run_check(id, spoil(worker, MUTANTS[id]), start, tmp_path)


@pytest.mark.parametrize("id", [id for id in MUTANTS if id != "TRN-112"])
async def test_the_check_is_met_by_the_sound_worker(id: str, worker: LiveWorker, start: Path, tmp_path: Path) -> None:
    await run_check(id, spoil(worker, {}), start, tmp_path)


async def test_every_live_check_has_a_mutant_or_a_reason() -> None:
    live = {requirement.id for _, _, requirement in checks_of(TrainingEngineConformance) if requirement.live}
    assert live == MUTANTS.keys() | WITHOUT_MUTANT.keys()
    assert not MUTANTS.keys() & WITHOUT_MUTANT.keys()
