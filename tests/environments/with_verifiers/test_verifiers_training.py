"""Environments of verifiers trained for real: in the plain loop, in a pipeline, with a tool; page and example hold."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import art
from art.environments.verifiers import VerifiersEnvironment
from art.local import LocalBackend
from art.pipeline_trainer import PipelineTrainer, make_group_rollout_fn
from art_conformance.tiny_model import write_base_model
from art_core.history import read_history
from art_runtime.environments.indexes import pip_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[3]
HERE = {"runtime": {"type": "subprocess"}}
REPLIES = {"taskset": {"id": "made_replies"}, "agent": HERE}
FP32 = {"engine_args": {"dtype": "float32"}, "init_args": {"dtype": "float32"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_base_model(tmp_path_factory.mktemp("base") / "tiny"))


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[Any]:
    async with LocalBackend(path=tmp_path, in_process=True, show_progress=False) as served:
        yield served


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """verifiers' own programs are prepared by the uv of this environment, from where pip is configured to look."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "made"))  # a tool's server is a process too
    pip = pip_settings()
    looks = {
        "UV_DEFAULT_INDEX": pip.get("index-url"),
        "UV_INDEX": pip.get("extra-index-url"),
        "UV_FIND_LINKS": pip.get("find-links"),
        "SSL_CERT_FILE": pip.get("cert"),
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    for name, value in looks.items():
        if value is not None and name not in os.environ:
            monkeypatch.setenv(name, " ".join(value.split()))


async def test_steps_of_the_plain_loop_are_trained_on_what_was_sampled(backend: Any, base: str) -> None:
    seats = {seat: {**HERE, "harness": {"id": "made_replies"}} for seat in ("assistant", "user")}
    talk = {"id": "user-sim", "taskset": {"id": "made_replies"}, **seats}
    talk["user"] |= {"max_turns": 3}
    model = art.TrainableModel(name="agent", project="verifiers", base_model=base, _internal_config=FP32)
    await model.register(backend)
    async with VerifiersEnvironment(talk, sampling={"max_tokens": 6}) as environment:
        for step in (1, 2):
            groups = await art.gather_trajectory_groups(
                (
                    art.TrajectoryGroup(environment.rollout(model, scenario) for _ in range(3))
                    for scenario in environment.scenarios(2)
                ),
                pbar_desc=None,
            )
            # Replies of equal rewards, as a random model may well give, are not trained. None of these is the mean.
            for group in groups:
                for place, trajectory in enumerate(group):
                    trajectory.reward = 2.0**place
            trajectories = [trajectory for group in groups for trajectory in group]
            assert all(len(trajectory.choices()) == 3 for trajectory in trajectories)
            assert {version for each in trajectories for version in each.policy_versions()} == {step - 1}
            # Told once: what a random model says is rarely what a tokenizer makes of it when it comes back.
            told = pytest.warns(RuntimeWarning, match="conversations of several turns") if step == 1 else nullcontext()
            with told:
                result = await backend.train(model, groups, learning_rate=1e-3)
            assert result.metrics["loss/mismatch_mean"] < 1e-3
            assert result.metrics["data/step_num_trajectories_trained"] == 6
            sampled = sum(len(choice.token_ids) for each in trajectories for choice in each.choices())
            assert result.metrics["data/step_trained_tokens"] == sampled


async def test_a_pipeline_runs_an_environment_on_the_steps_that_its_rollouts_hold(
    backend: Any, base: str, tmp_path: Path
) -> None:
    model = art.TrainableModel(name="agent", project="verifiers", base_model=base)
    await model.register(backend)
    async with VerifiersEnvironment(REPLIES, sampling={"max_tokens": 6}) as environment, asyncio.timeout(300):
        held: list[tuple[str, set[int]]] = []

        async def attempt(model: art.TrainableModel, scenario: Any, config: Any) -> art.Trajectory:
            name = model.get_inference_name()
            trajectory = await environment.rollout(model, scenario, config)
            held.append((name, trajectory.policy_versions()))
            return trajectory

        trainer = PipelineTrainer(
            model, backend, make_group_rollout_fn(attempt, 3), list(environment.scenarios()) * 3,
            num_rollout_workers=2, min_batch_size=2, max_batch_size=4, max_steps_off_policy=2, learning_rate=1e-3,
            eval_every_n_steps=0,
        )  # fmt: skip
        await trainer.train()
    rows = read_history(tmp_path / "verifiers/models/agent/history.jsonl")
    trained = [row for row in rows if row["split"] == "train"]
    assert len(trained) >= 3
    assert all("train/reward_is_short" in row and "train/letters" in row for row in trained)
    assert len(held) == 36
    assert all({name} == {f"agent@{version}" for version in versions} for name, versions in held)


async def test_a_program_of_verifiers_calls_a_tool_over_several_turns(backend: Any, base: str, programs: None) -> None:
    weather = {"taskset": {"id": "made_lookup"}, "agent": {**HERE, "harness": {"id": "null"}, "max_turns": 2}}
    model = art.TrainableModel(name="agent", project="verifiers", base_model=base, _internal_config=FP32)
    await model.register(backend)
    async with VerifiersEnvironment(weather, sampling={"max_tokens": 40, "temperature": 0}) as environment:
        scenario = next(environment.scenarios())
        group = await art.TrajectoryGroup(environment.rollout(model, scenario) for _ in range(2))
    assert not group.exceptions
    for reward, trajectory in enumerate(group):
        histories = trajectory.histories()
        (tool,) = [m for h in histories for m in h.messages() if m["role"] == "tool"]
        assert "It rains in Paris." in str(tool["content"])
        choices = [choice for history in histories for choice in history.choices()]
        assert [choice.message.tool_calls[0].function.name for choice in choices] == ["look_up", "look_up"]
        assert len(histories) == 1
        assert trajectory.tools is not None
        assert [tool["function"]["name"] for tool in trajectory.tools] == ["look_up"]
        assert trajectory.metrics["turns"] == 2
        assert trajectory.metrics["truncated"]
        assert trajectory.metadata["stop_condition"] == "max_turns"
        assert trajectory.reward > 0
        trajectory.reward = float(reward)
    # The tiny model's template leaves tool calls out, and a temperature of 0 isn't what the policy itself would do.
    with (
        pytest.warns(RuntimeWarning, match="2 of 2 conversations of several turns"),
        pytest.warns(RuntimeWarning, match="4 trained choices were drawn from other probabilities"),
    ):
        result = await backend.train(model, [group], learning_rate=1e-3)
    assert result.metrics["loss/mismatch_mean"] < 1e-3
    assert result.metrics["data/step_num_histories_split"] == 2


async def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    page = ROOT / "docs" / "environments.md"
    names = ModuleType("page")
    for marks, text in re.findall(r"^```python([^\n]*)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        if "file=" in marks:
            Path(marks.partition("file=")[2].strip()).write_text(text, encoding="utf-8")
            continue
        done = eval(compile(text, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names.__dict__)
        if inspect.isawaitable(done):
            await done
    assert names.result.step == 1
    assert [len(group) for group in names.groups] == [4, 4]
    assert callable(names.pipeline)


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", [[], ["--pipeline"]], ids=["plain", "pipeline"])
def test_the_example_learns(way: list[str], tmp_path: Path) -> None:
    script = ROOT / "examples" / "verifiers_replies.py"
    command = [sys.executable, str(script), "--steps", "4", "--name", "test", "--path", str(tmp_path), *way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = read_history(tmp_path / "verifiers-replies/models/test/history.jsonl")
    rewards = [row["train/reward"] for row in rows if "train/reward" in row]
    assert len(rewards) == 4
    assert rewards[-1] > rewards[0] + 0.05
