"""Each mutant of the training engine, run against every check of its suite, fails exactly the one that it is made for.

Runs the checks as pytest would, so that mutants whose worker's process is sound share one. Knows how checks are called
and what they are given; what is wrong with a mutant, `worker_mutants` knows.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from art_conformance import TrainingEngineConformance, training_job_checks
from art_conformance.live_worker import JobRefused, LiveWorker, save_start, start_worker
from art_conformance.oracle import oracle_for
from art_conformance.requirements import checks_of
from art_conformance.serving import port_for_a_server
from art_conformance.tiny_model import write_adapter
from art_conformance.training_data import make_groups
from art_core import ArtError, TrainingEngine, TrainingLaunch

# Beside this file, and no package's.
sys.path.insert(0, str(Path(__file__).parent))
mutants: Any = import_module("worker_mutants")

NOT_MET = (AssertionError, ArtError, JobRefused, TimeoutError, pytest.fail.Exception)
STOPS_THE_WORKER = "TRN-141"


def against_every_check(test: Any) -> Any:
    """The marks of a test that runs the whole suite."""
    marks = (pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(600))
    for mark in (*marks, pytest.mark.asyncio(loop_scope="module")):
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def launch(own_tiny_model: Path) -> TrainingLaunch:
    return TrainingLaunch(
        base_model=own_tiny_model,
        host="127.0.0.1",
        port=port_for_a_server(),
        token="token-mutants-0123456789",
        python=sys.executable,
        dtype="float32",
        max_seq_length=1024,
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sound(tmp_path_factory: pytest.TempPathFactory, launch: TrainingLaunch) -> AsyncIterator[LiveWorker]:
    worker = await start_worker(mutants.TORCH, launch, tmp_path_factory.mktemp("mutants") / "worker.log")
    yield worker
    await worker.close()


@pytest.fixture(scope="module")
def start(own_tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    adapter = write_adapter(root / "adapter", own_tiny_model, seed=21, strength=0.2)
    return save_start(root / "checkpoints" / "0000", adapter, step=0, base_model=own_tiny_model)


async def failing(
    engine: TrainingEngine, worker: LiveWorker, spoiled: type[LiveWorker], start: Path, tmp_path: Path
) -> set[str]:
    """The ids that an engine does not meet, with a worker of the kind `spoiled` in front of a running one.

    A second worker is started by the engine's plan: for the check that asks for a new one, and for the one that ends
    what it is given.
    """
    launch = replace(worker.launch, port=port_for_a_server())
    # While it starts, the first is at work.
    starting = asyncio.create_task(start_worker(engine, launch, tmp_path / "second.log"))

    async def second() -> LiveWorker:
        started = await asyncio.shield(starting)
        return spoiled(engine, started.launch, started.process, started.client)

    @asynccontextmanager
    async def new_worker(*_: Any) -> AsyncIterator[LiveWorker]:
        yield await second()

    oracle = oracle_for(launch.base_model)
    facts = {"engine": engine, "launch": launch, "start": start, "conformance_model": launch.base_model}
    facts |= {"oracle": oracle, "groups": make_groups(oracle, start)}
    first = spoiled(engine, worker.launch, worker.process, worker.client)
    suite = TrainingEngineConformance()
    make_job: Any = inspect.getattr_static(TrainingEngineConformance, "job")
    found = set()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training_job_checks, "working", new_worker)
            for name, _, requirement in checks_of(TrainingEngineConformance):
                if requirement.needs is not None and requirement.needs not in engine.capabilities:
                    continue
                folder = tmp_path / requirement.id
                folder.mkdir()
                facts |= {"tmp_path": folder, "job": make_job.__wrapped__(suite, folder, start)}
                facts["worker"] = await second() if requirement.id == STOPS_THE_WORKER else first
                method = getattr(suite, name)
                try:
                    done = method(**{word: facts[word] for word in inspect.signature(method).parameters})
                    if inspect.isawaitable(done):
                        await done
                except NOT_MET:
                    found.add(requirement.id)
    finally:
        await (await starting).close()
    return found


@against_every_check
async def test_the_sound_engine_meets_every_check(sound: LiveWorker, start: Path, tmp_path: Path) -> None:
    assert await failing(mutants.TORCH, sound, mutants.SpoiledWorker, start, tmp_path) == set()


@against_every_check
async def test_an_engine_that_declares_nothing_and_refuses_the_rest_meets_every_check(
    sound: LiveWorker, start: Path, tmp_path: Path
) -> None:
    assert await failing(mutants.ENGINES["TRN-114"], sound, mutants.RefusesSome, start, tmp_path) == set()


@against_every_check
@pytest.mark.parametrize("lacking", mutants.DECLARE_LESS)
async def test_whatever_an_engine_does_without_declaring_it_is_noticed(
    lacking: str, sound: LiveWorker, start: Path, tmp_path: Path
) -> None:
    found = await failing(mutants.DECLARE_LESS[lacking], sound, mutants.SpoiledWorker, start, tmp_path)
    assert found == {"TRN-114"}


@against_every_check
@pytest.mark.parametrize("id", mutants.ENGINES)
async def test_exactly_the_check_notices_a_wrong_engine(
    id: str, sound: LiveWorker, start: Path, tmp_path: Path
) -> None:
    assert await failing(mutants.ENGINES[id], sound, mutants.SpoiledWorker, start, tmp_path) == {id}


@against_every_check
@pytest.mark.parametrize("id", mutants.WORKERS)
async def test_exactly_the_check_notices_a_wrong_worker(
    id: str, sound: LiveWorker, start: Path, tmp_path: Path
) -> None:
    assert await failing(mutants.TORCH, sound, mutants.WORKERS[id], start, tmp_path) == {id}


@against_every_check
@pytest.mark.parametrize("id", mutants.PROCESSES)
async def test_exactly_the_check_notices_a_misbehaving_process(
    id: str, launch: TrainingLaunch, start: Path, tmp_path: Path
) -> None:
    engine = mutants.PROCESSES[id]
    worker = await start_worker(engine, replace(launch, port=port_for_a_server()), tmp_path / "first.log")
    try:
        assert await failing(engine, worker, mutants.SpoiledWorker, start, tmp_path) == {id}
    finally:
        await worker.close()


def test_every_check_has_a_mutant() -> None:
    ids = [requirement.id for _, _, requirement in checks_of(TrainingEngineConformance)]
    assert sorted([*mutants.ENGINES, *mutants.WORKERS, *mutants.PROCESSES]) == ids
