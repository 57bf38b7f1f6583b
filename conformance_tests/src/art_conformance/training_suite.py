"""`TrainingEngineConformance`: everything a training engine must do, its launch plan first, then its running worker.

The oracle is transformers and PEFT in fp32, one sequence at a time; the loss is computed here, in numpy.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from safetensors.numpy import load_file

from art_core import Capability, TrainingCapability, TrainingEngine, TrainingLaunch, TrajectoryGroup, UnknownArgument
from art_core.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_canary, read_manifest
from art_core.training_jobs import (
    AdapterOptions,
    GradientStep,
    JobEnded,
    JobFailed,
    JobProgress,
    JobSaved,
    JobStarted,
    TrainJob,
    TrainOptions,
    write_groups,
)

from .live_worker import JobRefused, LiveWorker, save_start, start_worker, working
from .oracle import Oracle, oracle_for
from .plans import check_devices, check_interpreter, check_plan_is_pure, check_secret, words_of
from .requirements import MUST, SHOULD, check
from .serving import port_for_a_server
from .suite import Suite
from .tiny_model import write_adapter
from .training_data import expected_loss, gain, make_groups, rows_of, shared_tokens

Cap = TrainingCapability
TOKEN = "token-conformance-0123456789abcdef"
LOSS_TOLERANCE = 2e-3
RATE = 1e-3
BUSY = (409, 423, 429, 503)


class TrainingEngineConformance(Suite):
    """Give the fixture `engine` (scope="class"): an instance of the training engine."""

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
    def engine_python(cls) -> str:
        """The interpreter of the engine's environment. Override for an engine with an environment of its own."""
        return sys.executable

    @pytest.fixture(scope="class")
    @classmethod
    def launch(cls, conformance_model: Path, engine_python: str) -> TrainingLaunch:
        """What the worker under test is asked to load: fp32, so that only mistakes differ from the oracle."""
        return TrainingLaunch(
            base_model=conformance_model,
            host="127.0.0.1",
            port=port_for_a_server(),
            token=TOKEN,
            python=engine_python,
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
        """Makes jobs: `job(groups, step=1, start=..., reference=..., **options)`."""

        def make(groups: list[TrajectoryGroup], *, step: int = 1, name: str = "run", **settings: Any) -> TrainJob:
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            groups_file = folder / f"groups-{step}.json"
            groups_file.write_bytes(write_groups(groups))
            own = {key: settings.pop(key) for key in ("start", "reference", "adapter") if key in settings}
            return TrainJob(
                model="conformance/agent",
                step=step,
                start=own.pop("start", start),
                destination=folder / "checkpoints" / f"{step:04d}",
                groups_file=groups_file,
                options=TrainOptions(**{"learning_rate": RATE, **settings}),
                **own,
            )

        return make

    @check("TRN-001", MUST, "The engine has a plain name and declares members of TrainingCapability, always the same.")
    def test_identity(self, engine: TrainingEngine) -> None:
        assert engine.name
        assert engine.name == engine.name.strip().lower()
        assert isinstance(engine.capabilities, frozenset)
        assert all(isinstance(c, TrainingCapability) for c in engine.capabilities)
        assert engine.capabilities == engine.capabilities
        assert isinstance(engine, TrainingEngine), "it lacks members of the TrainingEngine protocol"

    @check("TRN-002", MUST, "The worker's token travels in the plan's secret_env only, and no repr shows it.")
    def test_plan_holds_no_secret(self, engine: TrainingEngine, launch: TrainingLaunch) -> None:
        check_secret(engine.launch(launch), TOKEN)

    @check("TRN-003", MUST, "The plan names the host, the port and the folder of weights.")
    def test_plan_names_its_address(self, engine: TrainingEngine, launch: TrainingLaunch) -> None:
        words = words_of(engine.launch(launch))
        for wanted in (launch.host, str(launch.port), str(launch.base_model)):
            assert any(wanted in word for word in words), f"{wanted!r} is nowhere in the command or the environment"

    @check("TRN-004", MUST, "An init argument that does not exist is refused with UnknownArgument, which names it.")
    def test_unknown_argument(self, engine: TrainingEngine, launch: TrainingLaunch) -> None:
        with pytest.raises(UnknownArgument) as refusal:
            engine.launch(replace(launch, init_args={"xq_no_such_argument": 1}))
        assert refusal.value.name == "xq_no_such_argument"

    @check("TRN-005", MUST, "The same configuration gives the same plan, and making it changes nothing outside.")
    def test_plan_is_pure(self, engine: TrainingEngine, launch: TrainingLaunch) -> None:
        check_plan_is_pure(lambda: engine.launch(launch))

    @check("TRN-006", MUST, "The plan runs the interpreter it was given, or a script beside it.")
    def test_plan_uses_interpreter(self, engine: TrainingEngine, launch: TrainingLaunch) -> None:
        python = "/opt/engine-7c1/bin/python"
        check_interpreter(engine.launch(replace(launch, python=python)), python)

    @check("TRN-007", MUST, "The plan shows the worker the devices it was given and no others.")
    def test_plan_assigns_devices(self, engine: TrainingEngine, launch: TrainingLaunch) -> None:
        check_devices(lambda devices: engine.launch(replace(launch, devices=devices)))

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
        trained = sum(len(ids) for group in groups for trajectory in group for _, ids in rows_of(trajectory))
        assert started.trained_tokens == trained
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
        before, after = (load_file(folder / ADAPTER_WEIGHTS) for folder in (start, wanted.destination))
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
        before, after = (load_file(folder / ADAPTER_WEIGHTS) for folder in (start, wanted.destination))
        for name, values in before.items():
            np.testing.assert_array_equal(after[name], values, err_msg=name)

    @check(
        "TRN-107", MUST, "The loss of a step on policy is the contract's, over exactly the sampled tokens.", live=True
    )
    async def test_loss(
        self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup], start: Path, oracle: Oracle
    ) -> None:
        ended = await worker.train(job(groups, grad_accumulation_sequences=1000))
        wanted = expected_loss(oracle, start, groups)
        assert ended.metrics["loss/train"] == pytest.approx(wanted, abs=LOSS_TOLERANCE)

    @check(
        "TRN-108", MUST, "A trajectory of several turns is trained on all its sampled tokens and no others.", live=True
    )
    async def test_turns(self, worker: LiveWorker, job: Any, start: Path, oracle: Oracle) -> None:
        groups = make_groups(oracle, start, turns=3, seed=3)
        ended = await worker.train(job(groups, grad_accumulation_sequences=1000))
        wanted = expected_loss(oracle, start, groups)
        assert ended.metrics["loss/train"] == pytest.approx(wanted, abs=LOSS_TOLERANCE)

    @check("TRN-109", MUST, "Sampled tokens are taken by their ids, whatever the text beside them reads.", live=True)
    async def test_ids_not_text(self, worker: LiveWorker, job: Any, start: Path, oracle: Oracle) -> None:
        groups = make_groups(oracle, start, seed=4, text="something else entirely, of another length")
        ended = await worker.train(job(groups, grad_accumulation_sequences=1000))
        wanted = expected_loss(oracle, start, groups)
        assert ended.metrics["loss/train"] == pytest.approx(wanted, abs=LOSS_TOLERANCE)

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
    async def test_start_is_obeyed(
        self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup], start: Path, oracle: Oracle
    ) -> None:
        first, second = job(groups, name="a"), job(groups, name="b")
        one = await worker.train(first)
        two = await worker.train(second)
        assert one.metrics["loss/train"] == pytest.approx(two.metrics["loss/train"], abs=1e-4)
        saved = [load_file(wanted.destination / ADAPTER_WEIGHTS) for wanted in (first, second)]
        for name in saved[0]:
            np.testing.assert_allclose(saved[0][name], saved[1][name], atol=1e-5, err_msg=name)

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
        saved = [load_file(wanted.destination / ADAPTER_WEIGHTS) for wanted in (undisturbed, resumed)]
        for name in saved[0]:
            np.testing.assert_allclose(saved[0][name], saved[1][name], atol=1e-5, err_msg=name)

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
        same = await worker.train(job(groups, name="same", reference=start, **one_step))
        assert same.metrics["loss/kl_policy_ref"] == pytest.approx(0.0, abs=1e-5)
        other = write_adapter(tmp_path / "reference", conformance_model, seed=77)
        different = await worker.train(job(groups, name="other", reference=other, **one_step))
        base = await worker.train(job(groups, name="base", reference=None, **one_step))
        assert abs(different.metrics["loss/kl_policy_ref"]) > 1e-3
        assert abs(base.metrics["loss/kl_policy_ref"]) > 1e-4

    @check("TRN-114", MUST, "A job that needs an undeclared capability fails with UnsupportedCapability.", live=True)
    async def test_undeclared_is_refused(self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup]) -> None:
        if Cap.KL_REFERENCE in worker.engine.capabilities:
            return  # the only capability that a job can ask for; TRN-113 holds it
        failed = await worker.failing(job(groups, kl_penalty_coef=0.1))
        assert failed.error_type == "UnsupportedCapability"

    @check(
        *("TRN-115", MUST, "A prefix that trajectories share is computed once, and the loss is as if it were not."),
        needs=Cap.PREFIX_SHARING,
        live=True,
    )
    async def test_prefix_sharing(self, worker: LiveWorker, job: Any, start: Path, oracle: Oracle) -> None:
        groups = make_groups(oracle, start, turns=2, seed=5)
        events = await worker.run(job(groups, grad_accumulation_sequences=1000))
        started, ended = events[0], events[-1]
        assert isinstance(started, JobStarted)
        assert isinstance(ended, JobEnded), ended
        every, once = shared_tokens(groups)
        assert started.packed_tokens <= once + started.num_rows * 2, f"{started.packed_tokens} of {once} ({every})"
        wanted = expected_loss(oracle, start, groups)
        assert ended.metrics["loss/train"] == pytest.approx(wanted, abs=LOSS_TOLERANCE)

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
        before, after = (load_file(folder / ADAPTER_WEIGHTS) for folder in (start, wanted.destination))
        for name, values in before.items():
            np.testing.assert_array_equal(after[name], values, err_msg=name)

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
        before = read_manifest(wanted.destination, hashes=True)
        await worker.failing(wanted)
        assert read_manifest(wanted.destination, hashes=True) == before

    @check(
        "TRN-121",
        MUST,
        "Of two jobs at once the second waits or is refused, and neither disturbs the other.",
        live=True,
    )
    async def test_two_jobs(
        self, worker: LiveWorker, job: Any, groups: list[TrajectoryGroup], start: Path, oracle: Oracle
    ) -> None:
        both = [job(groups, name=name, grad_accumulation_sequences=1000) for name in ("a", "b")]
        outcomes = await asyncio.gather(*(worker.run(wanted) for wanted in both), return_exceptions=True)
        wanted_loss, worked = expected_loss(oracle, start, groups), 0
        for outcome in outcomes:
            if isinstance(outcome, JobRefused):
                assert outcome.status in BUSY
                continue
            assert not isinstance(outcome, BaseException), outcome
            ended = outcome[-1]
            assert isinstance(ended, JobEnded), ended
            assert ended.metrics["loss/train"] == pytest.approx(wanted_loss, abs=LOSS_TOLERANCE)
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
        saved = [load_file(wanted.destination / ADAPTER_WEIGHTS) for wanted in both]
        for name in saved[0]:
            np.testing.assert_array_equal(saved[0][name], saved[1][name], err_msg=name)

    @check("TRN-140", MUST, "The worker's log never holds its token.", live=True)
    async def test_log_holds_no_token(self, worker: LiveWorker) -> None:
        assert TOKEN not in worker.process.log_file.read_text(errors="replace")

    @check("TRN-141", MUST, "On SIGTERM the worker leaves within its plan's stop_timeout_s.", live=True)
    async def test_stops(self, worker: LiveWorker) -> None:
        plan = worker.engine.launch(worker.launch)
        async with asyncio.timeout(plan.stop_timeout_s + 30):
            ended = await worker.process.stop()
        assert ended.code not in (-9, 137), f"it had to be killed after {plan.stop_timeout_s:g} s: {ended.last_lines}"
