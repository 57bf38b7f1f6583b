"""One step of torchtune against transformers, PEFT and engine torch, in fp32: losses, gradients, adapters, resumes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from art_conformance.live_worker import save_start, seeded_start, working
from art_conformance.oracle import Oracle, oracle_for
from art_conformance.random_models import UNUSUAL_ADAPTERS, adapter_by_peft
from art_conformance.training_data import expected_loss, make_groups
from art_conformance.training_steps import RATE, WEIGHTS, farthest, step_job, step_launch, tensors
from art_core import TrainingLaunch, TrajectoryGroup, installed_plugins
from art_core.errors import ProcessFailed
from art_core.registry import instantiate
from art_engine_kit.canary import read_canary
from art_engine_kit.checkpoint_folder import OPTIMIZER_STATE, whole_steps
from art_engine_kit.training_wire import GradientStep
from art_engine_torch.base_model import resolve_base_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BASES = ("smollm2", "llama", "qwen2.5")


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, random_model: Callable[..., Path]) -> Path:
    if request.param == "qwen2.5":
        return random_model("qwen2", tie_word_embeddings=True, rope_theta=1e6)
    if request.param == "llama":
        scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope = {**scaled, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
        return random_model("llama", rope_parameters=rope, tie_word_embeddings=False)
    folder = resolve_base_model("smollm2-135m-instruct")
    assert folder is not None
    return folder


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


def running(engine: str, launch: TrainingLaunch, log: Path) -> Any:
    return working(instantiate(installed_plugins().training_engine(engine)), launch, log)


async def test_a_step_and_the_next_are_those_of_engine_torch_whoever_took_the_first(
    base: Path, oracle: Oracle, start: Path, groups: list[TrajectoryGroup], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    engines, ended, second = ("torch", "torchtune"), {}, {}
    async with AsyncExitStack() as stack:
        workers = {
            engine: await stack.enter_async_context(
                running(engine, step_launch(engine, base), tmp_path / f"{engine}.log")
            )
            for engine in engines
        }
        for engine, worker in workers.items():
            ended[engine] = (await worker.train(step_job(start, groups, tmp_path / engine))).metrics
        first = {engine: tmp_path / engine / "checkpoints" / "0001" for engine in engines}
        follow = make_groups(oracle, first["torch"], turns=2, seed=10, version=1)
        for before in engines:
            for engine, worker in workers.items():
                job = step_job(first[before], follow, tmp_path / f"{before}-{engine}", step=2)
                second[before, engine] = (await worker.train(job), job.destination)

    ours, theirs, exact = ended["torchtune"], ended["torch"], expected_loss(oracle, start, groups)
    gradient, largest = farthest(first["torchtune"], first["torch"], OPTIMIZER_STATE)
    weight, _ = farthest(first["torchtune"], first["torch"])
    alone, whole = second["torch", "torch"]
    resumed = max(farthest(folder, whole)[0] for _, folder in second.values())
    with capsys.disabled():
        print(
            f"\n{base.name}: |Δ loss| {abs(ours['loss/train'] - theirs['loss/train']):.1e} to torch,"
            f" {abs(ours['loss/train'] - exact):.1e} to transformers and PEFT; gradient norm"
            f" {ours['loss/grad_norm']:.4g}, {theirs['loss/grad_norm']:.4g} by torch; AdamW's moments off by"
            f" {gradient:.1e} of {largest:.1e}; weights by {weight:.1e}, after a second step by either {resumed:.1e},"
            f" at a rate of {RATE:g}"
        )
    assert ours["loss/train"] == pytest.approx(exact, abs=1e-4)
    assert ours["loss/train"] == pytest.approx(theirs["loss/train"], abs=1e-5)
    assert ours["loss/grad_norm"] == pytest.approx(theirs["loss/grad_norm"], rel=1e-4)
    assert gradient < 1e-4 * largest
    assert weight < WEIGHTS
    assert resumed < WEIGHTS
    for job_ended, _ in second.values():
        assert job_ended.metrics["loss/train"] == pytest.approx(alone.metrics["loss/train"], abs=1e-4)


async def test_the_adapter_is_what_peft_makes_of_its_files(
    base: Path, oracle: Oracle, start: Path, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    async with running("torchtune", step_launch("torchtune", base), tmp_path / "worker.log") as worker:
        job = step_job(start, groups, tmp_path / "run", learning_rate=1e-2)
        await worker.train(job)
    canary = read_canary(job.destination)
    assert canary is not None
    for prompt in canary.prompts:
        said = oracle.next_logprobs(prompt.token_ids, job.destination)[-1]
        assert {token: float(said[token]) for token in prompt.expected} == pytest.approx(prompt.expected, abs=1e-3)
        assert prompt.base is not None
        alone = oracle.next_logprobs(prompt.token_ids, None)[-1]
        assert {token: float(alone[token]) for token in prompt.base} == pytest.approx(prompt.base, abs=1e-3)


@pytest.mark.parametrize("base", BASES[1:], indirect=True)
async def test_adapters_of_any_shape_are_trained_as_peft_computes_them(
    base: Path, oracle: Oracle, tmp_path: Path
) -> None:
    async with running("torchtune", step_launch("torchtune", base), tmp_path / "worker.log") as worker:
        for name, settings in UNUSUAL_ADAPTERS.items():
            start = save_start(
                tmp_path / name / "checkpoints" / "0000", adapter_by_peft(base, tmp_path / f"{name}-peft", settings),
                step=0, base_model=base,
            )  # fmt: skip
            groups = make_groups(oracle, start, seed=11)
            ended = await worker.train(step_job(start, groups, tmp_path / name))
            assert ended.metrics["loss/train"] == pytest.approx(expected_loss(oracle, start, groups), abs=1e-4), name
            assert tensors(tmp_path / name / "checkpoints" / "0001").keys() == tensors(start).keys()


@pytest.mark.parametrize("base", BASES[2:], indirect=True)
async def test_recomputed_activations_and_bf16_take_the_same_step(
    base: Path, start: Path, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    ended = {}
    for name, changes in {
        "plain": {},
        "recomputed": {"init_args": {"gradient_checkpointing": True}},
        "bfloat16": {"dtype": "bfloat16"},
    }.items():
        async with running("torchtune", step_launch("torchtune", base, **changes), tmp_path / f"{name}.log") as worker:
            ended[name] = await worker.train(step_job(start, groups, tmp_path / name))
    plain = ended["plain"].metrics
    assert ended["recomputed"].metrics["loss/grad_norm"] == pytest.approx(plain["loss/grad_norm"], rel=1e-5)
    assert ended["bfloat16"].metrics["loss/train"] == pytest.approx(plain["loss/train"], abs=0.02)
    assert ended["bfloat16"].metrics["loss/grad_norm"] == pytest.approx(plain["loss/grad_norm"], rel=0.1)
    assert {t.dtype for t in tensors(tmp_path / "bfloat16" / "checkpoints" / "0001").values()} == {np.dtype("float32")}


@pytest.mark.parametrize("base", BASES[1:2], indirect=True)
async def test_a_worker_killed_in_the_middle_of_a_step_leaves_nothing_and_the_next_takes_the_whole_step(
    base: Path, start: Path, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    killed, again = (
        step_job(start, groups, tmp_path / name, grad_accumulation_sequences=1, packed_sequence_length=128)
        for name in ("killed", "again")
    )
    async with running("torchtune", step_launch("torchtune", base), tmp_path / "first.log") as worker:
        with pytest.raises(httpx.HTTPError):
            async for event in worker.events(killed):
                if isinstance(event, GradientStep):
                    worker.process.kill()
        await worker.process.wait_exit()
    assert not killed.destination.exists()
    async with running("torchtune", step_launch("torchtune", base), tmp_path / "second.log") as worker:
        ended = await worker.train(killed)
        assert (await worker.train(again)).metrics["loss/train"] == pytest.approx(ended.metrics["loss/train"], abs=1e-6)
    assert ended.metrics["data/step_num_gradient_steps"] > 1
    assert whole_steps(killed.destination.parent) == {1: killed.destination}
    assert farthest(killed.destination, again.destination)[0] < 1e-6


async def test_a_base_that_torchtune_has_no_builder_for_is_refused_with_an_engine_that_trains_it(
    random_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = random_model("qwen3", head_dim=16)
    with pytest.raises(ProcessFailed) as refused:
        async with running("torchtune", step_launch("torchtune", base), tmp_path / "worker.log"):
            pass
    said = str(refused.value) + (tmp_path / "worker.log").read_text()
    assert "model_type is 'qwen3'" in said
    assert "art-engine-torch" in said
