"""One step of Unsloth against transformers, PEFT, engine torch and torchtune, in fp32: losses, gradients, adapters,
resumes. What is trained here is computed by the path that Unsloth has for a CPU; its kernels need a GPU.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from art_conformance.live_worker import LiveWorker, save_start, seeded_start, working
from art_conformance.oracle import Oracle, oracle_for
from art_conformance.random_models import UNUSUAL_ADAPTERS, adapter_by_peft
from art_conformance.training_data import expected_loss, make_groups
from art_conformance.training_steps import RATE, WEIGHTS, farthest, replies_job, step_job, step_launch, tensors
from art_core import TrajectoryGroup, installed_plugins
from art_core.registry import instantiate
from art_engine_kit.canary import read_canary
from art_engine_kit.checkpoint_folder import OPTIMIZER_STATE, whole_steps
from art_engine_kit.training_wire import GradientStep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

Workers = Callable[[str], Awaitable[LiveWorker]]
BASES = ("llama", "qwen2.5", "qwen3")


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, random_model: Callable[..., Path]) -> Path:
    if request.param == "qwen2.5":
        return random_model("qwen2", tie_word_embeddings=True, rope_theta=1e6)
    if request.param == "qwen3":
        return random_model("qwen3", head_dim=16, tie_word_embeddings=False, rope_theta=1e6)
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {**scaled, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
    return random_model("llama", rope_parameters=rope, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def oracle(base: Path) -> Oracle:
    return oracle_for(base)


@pytest.fixture(scope="module")
def start(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded_start(tmp_path_factory.mktemp("start"), base)


@pytest.fixture(scope="module")
def groups(oracle: Oracle, start: Path) -> list[TrajectoryGroup]:
    """Eight conversations of two turns that share their prompts."""
    return make_groups(oracle, start, turns=2, seed=9)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(base: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Workers]:
    """`await worker("torch")`: that engine's worker on the base, which is started once and again after it died."""
    running: dict[str, LiveWorker] = {}
    async with AsyncExitStack() as stack:

        async def get(engine: str) -> LiveWorker:
            if engine not in running or not running[engine].process.running:
                card, log = installed_plugins().training_engine(engine), tmp_path_factory.mktemp(engine) / "worker.log"
                started = working(instantiate(card), step_launch(engine, base), log)
                running[engine] = await stack.enter_async_context(started)
            return running[engine]

        yield get


def engines_of(base: str) -> tuple[str, ...]:
    """torchtune has no Qwen3, and its own tests hold its Qwen2.5 against torch's."""
    return ("torch", "unsloth", "torchtune") if base == "llama" else ("torch", "unsloth")


async def test_a_step_and_the_next_are_those_of_other_engines_whoever_took_the_first(
    base: Path, oracle: Oracle, start: Path, groups: list[TrajectoryGroup], worker: Workers, tmp_path: Path,
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name = request.node.callspec.params["base"]
    engines = engines_of(name)
    first, ended, second = {}, {}, {}
    for engine in engines:
        job = step_job(start, groups, tmp_path / engine)
        ended[engine] = (await (await worker(engine)).train(job)).metrics
        first[engine] = job.destination
    follow = make_groups(oracle, first["torch"], turns=2, seed=10, version=1)
    for before in engines:
        for engine in engines:
            job = step_job(first[before], follow, tmp_path / f"{before}-{engine}", step=2)
            second[before, engine] = (await (await worker(engine)).train(job), job.destination)

    exact = expected_loss(oracle, start, groups)
    ours, alone = ended["unsloth"], second["torch", "torch"]
    resumed = max(farthest(folder, alone[1])[0] for _, folder in second.values())
    for other in [engine for engine in engines if engine != "unsloth"]:
        gradient, largest = farthest(first["unsloth"], first[other], OPTIMIZER_STATE)
        weight, _ = farthest(first["unsloth"], first[other])
        theirs = ended[other]
        with capsys.disabled():
            print(
                f"\n{name}: |Δ loss| {abs(ours['loss/train'] - theirs['loss/train']):.1e} to {other},"
                f" {abs(ours['loss/train'] - exact):.1e} to transformers and PEFT; gradient norm"
                f" {ours['loss/grad_norm']:.6g}, {theirs['loss/grad_norm']:.6g} by {other}; AdamW's moments off by"
                f" {gradient:.1e} of {largest:.1e}; weights by {weight:.1e}, after a second step by any {resumed:.1e},"
                f" at a rate of {RATE:g}"
            )
        assert ours["loss/train"] == pytest.approx(theirs["loss/train"], abs=1e-5)
        assert ours["loss/grad_norm"] == pytest.approx(theirs["loss/grad_norm"], rel=1e-4)
        assert gradient < 1e-4 * largest
        assert weight < WEIGHTS
    assert ours["loss/train"] == pytest.approx(exact, abs=1e-4)
    # What the fall-back from blocks to a mask of all pairs takes is said.
    assert ours["data/step_attention_mask_bytes"] == ours["data/step_packed_tokens"] ** 2
    assert ended["torch"]["data/step_attention_mask_bytes"] == 0
    assert resumed < WEIGHTS
    for job_ended, _ in second.values():
        assert job_ended.metrics["loss/train"] == pytest.approx(alone[0].metrics["loss/train"], abs=1e-4)


async def test_a_step_on_replies_is_that_of_other_engines(
    start: Path, groups: list[TrajectoryGroup], worker: Workers, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    jobs = {
        engine: replies_job(start, groups, tmp_path / engine)
        for engine in engines_of(request.node.callspec.params["base"])
    }
    metrics = {engine: (await (await worker(engine)).train(job)).metrics for engine, job in jobs.items()}
    for engine, job in jobs.items():
        assert metrics[engine]["data/step_num_gradient_steps"] == 1
        assert metrics[engine]["loss/train"] == pytest.approx(metrics["torch"]["loss/train"], abs=1e-5)
        assert farthest(job.destination, jobs["torch"].destination)[0] < WEIGHTS


async def test_the_adapter_is_what_peft_makes_of_its_files(
    oracle: Oracle, start: Path, groups: list[TrajectoryGroup], worker: Workers, tmp_path: Path
) -> None:
    job = step_job(start, groups, tmp_path / "run", learning_rate=1e-2)
    await (await worker("unsloth")).train(job)
    canary = read_canary(job.destination)
    assert canary is not None
    for prompt in canary.prompts:
        said = oracle.next_logprobs(prompt.token_ids, job.destination)[-1]
        assert {token: float(said[token]) for token in prompt.expected} == pytest.approx(prompt.expected, abs=1e-3)
        assert prompt.base is not None
        alone = oracle.next_logprobs(prompt.token_ids, None)[-1]
        assert {token: float(alone[token]) for token in prompt.base} == pytest.approx(prompt.base, abs=1e-3)


@pytest.mark.parametrize("base", BASES[2:], indirect=True)
async def test_adapters_of_any_shape_are_trained_as_peft_computes_them(
    base: Path, oracle: Oracle, worker: Workers, tmp_path: Path
) -> None:
    for name, settings in UNUSUAL_ADAPTERS.items():
        adapter = adapter_by_peft(base, tmp_path / f"{name}-peft", settings)
        start = save_start(tmp_path / name / "checkpoints" / "0000", adapter, step=0, base_model=base)
        groups = make_groups(oracle, start, seed=11)
        job = step_job(start, groups, tmp_path / name)
        ended = await (await worker("unsloth")).train(job)
        assert ended.metrics["loss/train"] == pytest.approx(expected_loss(oracle, start, groups), abs=1e-4), name
        assert tensors(job.destination).keys() == tensors(start).keys()


@pytest.mark.parametrize("base", BASES[2:], indirect=True)
async def test_a_worker_killed_in_the_middle_of_a_step_leaves_nothing_and_the_next_takes_the_whole_step(
    start: Path, groups: list[TrajectoryGroup], worker: Workers, tmp_path: Path
) -> None:
    killed, again = (
        step_job(start, groups, tmp_path / name, grad_accumulation_sequences=1, packed_sequence_length=128)
        for name in ("killed", "again")
    )
    first = await worker("unsloth")
    with pytest.raises(httpx.HTTPError):
        async for event in first.events(killed):
            if isinstance(event, GradientStep):
                first.process.kill()
    await first.process.wait_exit()
    assert not killed.destination.exists()
    second = await worker("unsloth")
    assert second is not first
    ended = await second.train(killed)
    assert (await second.train(again)).metrics["loss/train"] == pytest.approx(ended.metrics["loss/train"], abs=1e-6)
    assert ended.metrics["data/step_num_gradient_steps"] > 1
    assert whole_steps(killed.destination.parent) == {1: killed.destination}
    assert farthest(killed.destination, again.destination)[0] < 1e-6
