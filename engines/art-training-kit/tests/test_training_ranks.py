"""Several processes that train one job: they take the step of one, a fault of one of them is the fault of all, and none
outlives another.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import httpx
import psutil
import pytest

from art_conformance.live_worker import LiveWorker, seeded_start, working
from art_conformance.oracle import oracle_for
from art_conformance.random_models import write_random_model
from art_conformance.tiny_model import write_base_model
from art_conformance.training_data import expected_loss, make_groups
from art_conformance.training_steps import RATE, WEIGHTS, farthest, replies_job, step_job, step_launch
from art_core import LaunchPlan, TrainingCapability, TrainingLaunch, TrajectoryGroup, installed_plugins
from art_core.registry import instantiate
from art_engine_kit.checkpoint_folder import OPTIMIZER_STATE, whole_steps
from art_engine_kit.training_wire import GradientStep, JobEnded, KlReference, TrainJob
from art_training_kit.launch import worker_plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Engine torch's policy, with a fault of a rank that a file has as "RANK KIND" and that takes it once: at its next row
# that is trained, where it loads the start, or where it asks for the adapter's parameters for the nth time after that.
FAULTY_POLICY = """
import os, sys, time
from pathlib import Path

import torch
from art_engine_torch.training.policy import load_policy

RANK = sys.argv[sys.argv.index("--rank") + 1] if "--rank" in sys.argv else "0"
FAULT = Path(os.environ["FAULT"])


def load(request):
    policy = load_policy(request)
    compute, load_adapter, parameters = policy.hidden_states, policy.load_adapter, policy.adapter_parameters
    asked = 0

    def kind_now():
        try:
            rank, _, kind = FAULT.read_text().partition(" ")
        except FileNotFoundError:
            # There is none, or the other rank has taken its own a moment ago.
            return ""
        return kind if rank == RANK else ""

    def fail_at(place):
        if kind_now() == place:
            FAULT.unlink()
            raise ValueError("what this rank does is nonsense")

    def loading(folder):
        nonlocal asked
        fail_at("load")
        asked = 0
        load_adapter(folder)

    def adapter_parameters():
        nonlocal asked
        asked += 1
        fail_at(f"parameters {asked}")
        return parameters()

    def hidden_states(row):
        kind = kind_now()
        if kind in ("slow", "memory", "broken") and torch.is_grad_enabled():
            if kind == "slow":
                (FAULT.parent / f"slow-{RANK}").touch()
                time.sleep(600)
            FAULT.unlink()
            if kind == "memory":
                raise torch.OutOfMemoryError("no memory is left for this row")
            raise ValueError("what this rank computes is nonsense")
        return compute(row)

    policy.hidden_states = hidden_states
    policy.load_adapter, policy.adapter_parameters = loading, adapter_parameters
    return policy
"""


@dataclass(frozen=True)
class FaultyEngine:
    folder: Path
    name: str = "torch"
    capabilities: frozenset[TrainingCapability] = frozenset()

    @property
    def fault(self) -> Path:
        return self.folder / "fault"

    def launch(self, config: TrainingLaunch) -> LaunchPlan:
        (self.folder / "faulty_policy.py").write_text(FAULTY_POLICY)
        return worker_plan(
            config,
            "faulty_policy:load",
            {"PYTHONPATH": str(self.folder), "FAULT": str(self.fault), "TMPDIR": str(self.folder)},
        )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def start(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded_start(tmp_path_factory.mktemp("start"), base)


@pytest.fixture(scope="module")
def groups(base: Path, start: Path) -> list[TrajectoryGroup]:
    """Eight conversations of two turns."""
    return make_groups(oracle_for(base), start, turns=2, seed=9)


@asynccontextmanager
async def ranks(
    count: int, base: Path, folder: Path, **init_args: bool
) -> AsyncIterator[tuple[LiveWorker, FaultyEngine]]:
    engine = FaultyEngine(folder)
    async with working(
        engine, step_launch("torch", base, init_args={"ranks": count, **init_args}), folder / f"{count}.log"
    ) as worker:
        yield worker, engine


def processes(worker: LiveWorker) -> list[psutil.Process]:
    """Of a worker: what holds it, and its ranks in order."""
    found = psutil.Process(worker.process.pid).children(recursive=True)
    return sorted((each for each in found if "--policy" in each.cmdline()), key=lambda each: each.create_time())


async def gone(found: list[psutil.Process], limit_s: float = 10) -> None:
    """Wait until none of these is there."""
    async with asyncio.timeout(limit_s):
        while any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in found):
            await asyncio.sleep(0.02)


def jobs(start: Path, groups: list[TrajectoryGroup], folder: Path) -> dict[str, TrainJob]:
    """One of each kind. A row takes one conversation or two and an optimizer step three rows, so ranks have unequal
    parts.
    """
    folder.mkdir(exist_ok=True)
    short = {"packed_sequence_length": 136, "grad_accumulation_sequences": 3}
    fresh = step_job(start, groups, folder / "reference", precalculate_logprobs=True, **short)
    options = fresh.options.model_copy(update={"kl_penalty_coef": 0.1})
    return {
        "whole": step_job(start, groups, folder / "whole"),
        "rewards": step_job(start, groups, folder / "rewards", **short),
        "reference": fresh.model_copy(update={"options": options, "reference": KlReference()}),
        "replies": replies_job(start, groups, folder / "replies"),
    }


async def test_two_ranks_take_the_step_of_one(
    base: Path, start: Path, groups: list[TrajectoryGroup], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ways: dict[str, tuple[int, dict[str, bool]]] = {
        "alone": (1, {}),
        "two": (2, {}),
        "spread": (2, {"shard_base": True}),
    }
    ended: dict[str, dict[str, tuple[TrainJob, JobEnded, int]]] = {way: {} for way in ways}
    for way, (count, init_args) in ways.items():
        folder = tmp_path / way
        folder.mkdir()
        async with ranks(count, base, folder, **init_args) as (worker, _):
            for kind, job in jobs(start, groups, folder).items():
                events = await worker.run(job)
                assert isinstance(events[-1], JobEnded), events[-1]
                ended[way][kind] = job, events[-1], sum(isinstance(each, GradientStep) for each in events)
            # The optimizer's state is every rank's own, and is taken up by all.
            job, _, _ = ended[way]["rewards"]
            follow = step_job(job.destination, groups, folder / "rewards", step=2, grad_accumulation_sequences=None)
            ended[way]["next"] = follow, await worker.train(follow), 0
        said = re.findall(r"of its decoder's (\d+) bytes each holds (\d+)", worker.process.log_tail(1000))
        assert bool(said) == bool(init_args)
        assert all(int(mine) <= 0.51 * int(whole) for whole, mine in said)
    for kind, (job, end, steps) in ended["alone"].items():
        for way in ("two", "spread"):
            other, other_end, other_steps = ended[way][kind]
            weights, _ = farthest(other.destination, job.destination)
            moments, largest = farthest(other.destination, job.destination, OPTIMIZER_STATE)
            with capsys.disabled():
                print(
                    f"\n{kind}, {way}: weights off by {weights:.1e} at a rate of {RATE:g}, moments by {moments:.1e} of"
                    f" {largest:.1e}"
                )
            assert weights < WEIGHTS
            assert moments < 1e-4 * largest
            assert steps == other_steps
            for key in (key for key in end.metrics if key.startswith("loss/")):
                assert other_end.metrics[key] == pytest.approx(end.metrics[key], rel=1e-3, abs=1e-5), (kind, key)
    assert ended["alone"]["rewards"][2] > 1
    exact = expected_loss(oracle_for(base), start, groups)
    assert ended["two"]["whole"][1].metrics["loss/train"] == pytest.approx(exact, abs=1e-4)


async def test_a_fault_in_the_midst_of_a_spread_base_ends_the_worker_in_its_words(
    base: Path, start: Path, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    async with ranks(3, base, tmp_path, shard_base=True) as (worker, engine):
        found = processes(worker)
        engine.fault.write_text("1 broken")
        with pytest.raises(httpx.HTTPError):
            await worker.run(step_job(start, groups, tmp_path / "failed"))
        await gone(found)
        await asyncio.wait_for(worker.process.wait_exit(), 10)
        # The others have tracebacks of their own, by hazard before or after those words, and as long as the end of a
        # log that an error shows: the last that the worker says of it has them, too.
        last = [line for line in worker.process.log_file.read_text().splitlines() if "This worker ends" in line]
        assert any("what this rank computes is nonsense" in line for line in last)
        assert whole_steps(tmp_path / "failed" / "checkpoints") == {}


async def test_a_fault_of_one_rank_fails_the_job_in_its_words_and_the_next_job_is_as_ever(
    base: Path, start: Path, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    async with ranks(2, base, tmp_path) as (worker, engine):
        for number in (0, 1):
            engine.fault.write_text(f"{number} broken")
            failed = await worker.failing(step_job(start, groups, tmp_path / f"failed-{number}"))
            assert "what this rank computes is nonsense" in failed.message
            assert ("rank 1 of 2" in failed.message) == (number == 1)
            assert whole_steps(tmp_path / f"failed-{number}" / "checkpoints") == {}
        for number in (0, 1):
            engine.fault.write_text(f"{number} memory")
            # Once more by both, with rows half as long.
            await worker.train(step_job(start, groups, tmp_path / f"short-{number}"))
            assert not engine.fault.exists()
        good = step_job(start, groups, tmp_path / "good")
        await worker.train(good)
        for number in (0, 1):
            apart, _ = farthest(tmp_path / f"short-{number}" / "checkpoints" / "0001", good.destination)
            assert apart < WEIGHTS


@pytest.mark.parametrize("init_args", [{}, {"shard_base": True}], ids=["whole", "spread"])
async def test_a_fault_beside_the_rows_fails_the_job_of_every_rank_and_nothing_is_saved(
    base: Path, start: Path, groups: list[TrajectoryGroup], tmp_path: Path, init_args: dict[str, bool]
) -> None:
    # The optimizer is made, what is there is measured, the gradients are added up, the step has been taken.
    places = ("load", "parameters 1", "parameters 2", "parameters 3", "parameters 4")
    async with ranks(2, base, tmp_path, **init_args) as (worker, engine):
        for number, place in product((1, 0), places):
            engine.fault.write_text(f"{number} {place}")
            folder = tmp_path / f"failed-{number}-{place}"
            failed = await asyncio.wait_for(worker.failing(step_job(start, groups, folder)), 30)
            assert "what this rank does is nonsense" in failed.message
            assert ("rank 1 of 2" in failed.message) == (number == 1)
            assert whole_steps(folder / "checkpoints") == {}
        await worker.train(step_job(start, groups, tmp_path / "good"))


async def test_a_client_that_goes_away_cancels_the_job_of_every_rank(
    base: Path, start: Path, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    async with ranks(2, base, tmp_path) as (worker, _):
        options = {"grad_accumulation_sequences": 2, "packed_sequence_length": 136}
        job = step_job(start, groups * 8, tmp_path / "gone", **options)
        async for event in worker.events(job):
            if isinstance(event, GradientStep):
                break
        async with asyncio.timeout(60):
            while (await worker.client.get("/health")).json()["status"] != "idle":
                await asyncio.sleep(0.05)
        assert whole_steps(tmp_path / "gone" / "checkpoints") == {}
        await worker.train(step_job(start, groups, tmp_path / "next"))


@pytest.mark.parametrize(("victim", "busy"), [(0, True), (1, True), (1, False)])
async def test_none_outlives_another(
    base: Path, start: Path, groups: list[TrajectoryGroup], tmp_path: Path, victim: int, busy: bool
) -> None:
    async with ranks(2, base, tmp_path) as (worker, engine):
        found = processes(worker)
        assert len(found) == 2
        job = step_job(start, groups, tmp_path / "killed", grad_accumulation_sequences=None)

        async def train() -> None:
            with pytest.raises(httpx.HTTPError):
                await worker.run(job)

        training = None
        if busy:
            # The other waits for this one's row.
            engine.fault.write_text(f"{victim} slow")
            training = asyncio.create_task(train())
            async with asyncio.timeout(60):
                while not (tmp_path / f"slow-{victim}").exists():
                    await asyncio.sleep(0.02)
        os.kill(found[victim].pid, signal.SIGKILL)
        await gone(found)
        if training is not None:
            await asyncio.wait_for(training, 10)
        await asyncio.wait_for(worker.process.wait_exit(), 10)
        if victim == 1:
            assert f"rank 1 of 2 (process {found[1].pid}) was ended by signal 9" in worker.process.log_tail()
        assert whole_steps(tmp_path / "killed" / "checkpoints") == {}
        assert not list(tmp_path.glob("art-ranks-*"))


@pytest.mark.usefixtures("sigint_is_heard")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
async def test_none_outlives_a_first_that_ends_before_they_have_met(
    base: Path, tmp_path: Path, number: signal.Signals
) -> None:
    plan = FaultyEngine(tmp_path).launch(step_launch("torch", base, init_args={"ranks": 3}))
    # Without the tether, which would end what is left.
    first = subprocess.Popen(plan.argv, env={**os.environ, **plan.env}, start_new_session=True)
    found = [psutil.Process(first.pid)]
    try:
        while len(found) < 3:
            found = [found[0], *found[0].children()]
        # A terminal and the tether tell all of them, the others too early to have heard of it.
        (os.kill if number == signal.SIGKILL else os.killpg)(first.pid, number)
        await asyncio.to_thread(first.wait, 60)
        await gone(found, 60)
        assert not list(tmp_path.glob("art-ranks-*"))
    finally:
        for each in found:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        first.wait()


async def test_ranks_listen_to_this_machine_only(base: Path, tmp_path: Path) -> None:
    async with ranks(2, base, tmp_path) as (worker, _):
        listening = [
            connection.laddr.ip
            for process in processes(worker)
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN and connection.type == socket.SOCK_STREAM
        ]
    assert listening
    assert set(listening) == {"127.0.0.1"}


async def test_a_base_that_cannot_be_loaded_is_said_once_and_leaves_nobody(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="nowhere"):
        async with ranks(2, tmp_path / "nowhere", tmp_path):
            pass
    log = (tmp_path / "2.log").read_text()
    assert "Fatal Python error" not in log
    assert "This worker ends" not in log
    assert not list(tmp_path.glob("art-ranks-*"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ["torchtune", "unsloth"])
async def test_two_ranks_of_a_library_that_knows_of_none_take_the_step_of_one(engine: str, tmp_path: Path) -> None:
    base = write_random_model(tmp_path / "base", "llama")
    start = seeded_start(tmp_path, base)
    groups = make_groups(oracle_for(base), start, turns=2, seed=9)
    made = []
    for count in (1, 2):
        launch = step_launch(engine, base, init_args={"ranks": count})
        async with working(
            instantiate(installed_plugins().training_engine(engine)), launch, tmp_path / "log"
        ) as worker:
            job = jobs(start, groups, tmp_path / f"{count}")["rewards"]
            await worker.train(job)
        made.append(job.destination)
    apart, _ = farthest(*made)
    assert apart < WEIGHTS
