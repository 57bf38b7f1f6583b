"""The worker under test, what it starts from and the jobs that it is sent, for the checks of training engines.

The oracle is transformers and PEFT in fp32, one sequence at a time; the loss is computed here, in numpy.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray
from safetensors.numpy import load_file

from art_core import Capability, TrainingEngine, TrainingLaunch, TrajectoryGroup, installed_plugins
from art_engine_kit.checkpoint_folder import ADAPTER_WEIGHTS
from art_engine_kit.environment import Flavour
from art_engine_kit.groups_file import write_groups
from art_engine_kit.train_options import TrainOptions
from art_engine_kit.training_wire import JobEnded, TrainEvent, TrainJob

from .live_worker import LiveWorker, save_start, start_worker
from .oracle import Oracle, oracle_for
from .serving import port_for_a_server
from .suite import Suite
from .targets import interpreter_of
from .tiny_model import write_adapter
from .training_data import expected_loss, make_groups

TOKEN = "token-conformance-0123456789abcdef"
LOSS_TOLERANCE = 2e-3
RATE = 1e-3
_OF_THE_JOB = ("start", "reference", "adapter", "supervised", "tell_written")


class TrainingEngineSuite(Suite):
    """What the checks of `TrainingEngineConformance` share: the worker, the checkpoint it starts from, and jobs."""

    flavour: ClassVar[Flavour | None] = None

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> TrainingEngine:
        raise pytest.UsageError("give the fixture `engine` (scope='class'): an instance of the training engine")

    @pytest.fixture(scope="class")
    @classmethod
    def declared(cls, engine: TrainingEngine) -> Collection[Capability]:
        return engine.capabilities

    @pytest.fixture(scope="class")
    @classmethod
    def launch(cls, request: pytest.FixtureRequest, engine: TrainingEngine, conformance_model: Path) -> TrainingLaunch:
        """What the worker under test is asked to load: fp32, so that only mistakes differ from the oracle."""
        return TrainingLaunch(
            base_model=conformance_model,
            host="127.0.0.1",
            port=port_for_a_server(),
            token=TOKEN,
            python=interpreter_of(request.config, installed_plugins().training_engine, engine.name, cls.flavour),
            dtype="float32",
            max_seq_length=1024,
        )

    @pytest.fixture(scope="class")
    @classmethod
    def oracle(cls, conformance_model: Path) -> Oracle:
        return oracle_for(conformance_model)

    @pytest.fixture(scope="class")
    @classmethod
    def start(cls, conformance_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A checkpoint to train from: a random adapter that is not the identity."""
        root = tmp_path_factory.mktemp("start")
        adapter = write_adapter(root / "adapter", conformance_model, seed=21, strength=0.2)
        return save_start(root / "checkpoints" / "0000", adapter, step=0, base_model=conformance_model)

    @pytest.fixture(scope="class")
    @classmethod
    def groups(cls, oracle: Oracle, start: Path) -> list[TrajectoryGroup]:
        """Eight trajectories, sampled from `start`, sharing their prompts."""
        return make_groups(oracle, start)

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def workers(cls) -> AsyncIterator[list[LiveWorker]]:
        """The worker of this class as the only item of a list; `worker` starts it, and again after it died."""
        running: list[LiveWorker] = []
        yield running
        for worker in running:
            await worker.close()

    @pytest_asyncio.fixture(loop_scope="class")
    async def worker(
        self,
        workers: list[LiveWorker],
        engine: TrainingEngine,
        launch: TrainingLaunch,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> LiveWorker:
        """A running worker, whatever the check before did to it."""
        if workers and not workers[0].process.running:
            await workers.pop().close()
        if not workers:
            workers.append(await start_worker(engine, launch, tmp_path_factory.mktemp("worker") / "worker.log"))
        return workers[0]

    @pytest.fixture
    def job(self, tmp_path: Path, start: Path) -> Any:
        """Makes jobs: `job(groups, step=1, start=..., reference=..., **options)`; supervised ones take no options."""

        def make(groups: list[TrajectoryGroup], *, step: int = 1, name: str = "run", **settings: Any) -> TrainJob:
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            groups_file = folder / f"groups-{step}.json"
            write_groups(groups_file, groups)
            own = {key: settings.pop(key) for key in _OF_THE_JOB if key in settings}
            options = {"learning_rate": RATE, **settings} if own.get("supervised") is None else settings
            return TrainJob(
                model="conformance/agent",
                step=step,
                start=own.pop("start", start),
                destination=folder / "checkpoints" / f"{step:04d}",
                groups_file=groups_file,
                options=TrainOptions(**options),
                **own,
            )

        return make

    async def assert_loss(
        self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup], start: Path, oracle: Oracle
    ) -> list[TrainEvent]:
        """Train one gradient step, and fail unless its loss is the oracle's; gives the job's events."""
        events = await worker.run(job(groups, grad_accumulation_sequences=1000))
        ended = events[-1]
        assert isinstance(ended, JobEnded), f"the job failed: {ended}"
        assert ended.metrics["loss/train"] == pytest.approx(expected_loss(oracle, start, groups), abs=LOSS_TOLERANCE)
        return events


def adapter_weights(folder: Path) -> dict[str, NDArray[np.float32]]:
    """The tensors of a checkpoint's adapter."""
    return load_file(folder / ADAPTER_WEIGHTS)


def assert_same_weights(one: Path, other: Path, *, within: float = 0.0) -> None:
    """Fail unless the adapters of two checkpoints differ by no more than `within` in any element."""
    before, after = adapter_weights(one), adapter_weights(other)
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, rtol=0, atol=within, err_msg=name)


def assert_same_step(one: tuple[TrainJob, JobEnded], other: tuple[TrainJob, JobEnded]) -> None:
    """Fail unless two jobs that were done took one and the same step, but for rounding."""
    (first, ended), (second, then) = one, other
    assert then.metrics["loss/train"] == pytest.approx(ended.metrics["loss/train"], abs=1e-4)
    assert_same_weights(first.destination, second.destination, within=1e-5)
