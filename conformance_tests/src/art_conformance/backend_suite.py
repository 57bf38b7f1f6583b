"""`BackendConformance`: registering, training, steps and checkpoints, the same on every backend.

What is served under which name is `PublicationConformance`'s.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from art_core import ArtError, Backend, BackendCapability, TrainResult, Trajectory, TrajectoryGroup, inference_name
from art_core.errors import (
    BaseModelNotFound,
    CheckpointInUse,
    InvalidName,
    InvalidTrajectory,
    ModelBusy,
    UnknownArgument,
)
from art_engine_kit.checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS

from .agents import SMALL_RATE, Agent, version_of
from .backend_fixtures import BackendSuite, NewAgent, OpenBackend
from .backend_machine import MachineChecks
from .cancellation_checks import CancellationChecks
from .lease_checks import LeaseChecks
from .name_checks import NameChecks
from .oracle import Oracle
from .recorder import STEP, TRAINING
from .repeat_checks import RepeatChecks
from .requirements import MUST, SHOULD, check
from .suite import undeclared
from .supervised_checks import SupervisedChecks
from .tiny_model import write_adapter

Cap = BackendCapability


class BackendConformance(
    SupervisedChecks, LeaseChecks, RepeatChecks, CancellationChecks, NameChecks, MachineChecks, BackendSuite
):
    """Give the fixture `open_backend` (scope="class"): a function from a folder of its own to a backend."""

    @check("BCK-001", MUST, "The backend implements the protocol and has a plain name.", live=True)
    async def test_protocol(self, backend: Backend) -> None:
        assert isinstance(backend, Backend), "it lacks members of the Backend protocol"
        assert backend.name
        assert backend.name == backend.name.strip().lower()

    @check("BCK-002", MUST, "It declares members of BackendCapability, which never change once it is made.", live=True)
    async def test_capabilities(self, backend: Backend, new_agent: NewAgent) -> None:
        before = backend.capabilities
        assert isinstance(before, frozenset)
        assert all(isinstance(capability, BackendCapability) for capability in before)
        await new_agent()
        assert backend.capabilities == before

    @check("BCK-003", MUST, "Registering serves the model at step 0; registering again changes nothing.", live=True)
    async def test_register(self, agent: Agent) -> None:
        assert await agent.backend.get_step(agent.model) == 0
        again = await agent.backend.register(agent.model)
        assert again == agent.registration
        assert await agent.backend.get_step(agent.model) == 0
        assert agent.registration.inference_base_url.startswith("http")
        assert agent.registration.inference_api_key
        assert agent.registration.inference_api_key not in repr(agent.registration)

    @check("BCK-004", MUST, "Two registrations of one new model at once give the same registration.", live=True)
    async def test_registered_at_once(self, agent: Agent) -> None:
        name = f"{agent.model.name}-twice"
        model = replace(agent.model, name=name)
        both = await asyncio.gather(agent.backend.register(model), agent.backend.register(model))
        assert both[0] == both[1]
        assert await agent.backend.get_step(model) == 0
        assert await agent.backend.list_steps(model) == [0]

    @check("BCK-005", MUST, "The endpoint refuses a missing or wrong key with 401.", live=True)
    async def test_key(self, agent: Agent) -> None:
        for key in ("", "wrong"):
            assert (await agent.post(key=key)).status_code == 401

    @check(
        "BCK-006",
        MUST,
        "train gives a TrainResult of the next step, with finite metrics under the contract's names.",
        live=True,
    )
    async def test_train(self, agent: Agent) -> None:
        for step in (1, 2):
            result = await agent.train()
            assert isinstance(result, TrainResult)
            assert result.step == step == await agent.backend.get_step(agent.model)
            for name in ("loss/train", "loss/grad_norm", "data/step_num_gradient_steps", "data/step_trainer_tokens"):
                assert math.isfinite(result.metrics.get(name, math.nan)), f"{name} is {result.metrics.get(name)}"
            assert result.metrics["data/step_num_gradient_steps"] >= 1

    @check("BCK-007", MUST, "train logs neither metrics nor trajectories.", live=True)
    async def test_train_logs_nothing(self, agent: Agent) -> None:
        await agent.train()
        assert not agent.heard.names("art_log_metrics", "art_log_trajectories")
        root = agent.registration.base_path or Path(agent.model.base_path)
        folder = agent.model.key.folder(root)
        assert not list(folder.glob("history.jsonl")), "train wrote history.jsonl"
        assert not list(folder.glob("trajectories/**/*.parquet")), "train wrote trajectories"

    @check("BCK-008", MUST, "An unknown train argument is refused by name before anything happens.", live=True)
    async def test_unknown_argument(self, agent: Agent) -> None:
        with pytest.raises(UnknownArgument) as refusal:
            await agent.train(learning_rat=1e-5)
        assert refusal.value.name == "learning_rat"
        assert "learning_rate" in str(refusal.value)
        assert await agent.backend.get_step(agent.model) == 0

    @check(
        "BCK-009",
        MUST,
        "A reward that is not finite is refused, naming the trajectory, and nothing changes.",
        live=True,
    )
    async def test_bad_rewards(self, agent: Agent) -> None:
        for reward in (math.nan, math.inf):
            groups = await agent.groups()
            groups[1].trajectories[2].reward = reward
            with pytest.raises(InvalidTrajectory) as refusal:
                await agent.backend.train(agent.model, groups)
            assert "1" in str(refusal.value)
            assert "2" in str(refusal.value)
        assert await agent.backend.get_step(agent.model) == 0

    @check(
        "BCK-010",
        MUST,
        "With nothing to train on, the checkpoint is carried to the next step, and published.",
        live=True,
    )
    async def test_nothing_to_train(self, agent: Agent, oracle: Oracle) -> None:
        await agent.train()
        equal = await agent.groups(rewards=(1.0, 1.0, 1.0))
        for step, groups in ((2, equal), (3, [TrajectoryGroup([])]), (4, [])):
            result = await agent.backend.train(agent.model, groups)
            assert result.step == step == await agent.backend.get_step(agent.model)
            assert result.metrics["data/step_num_gradient_steps"] == 0
            found = await agent.ask(n=2)
            assert {version_of(sample) for sample in found} == {step}
            self.assert_answers_as(oracle, found, await agent.folder(1))

    @check("BCK-011", MUST, "A model that isn't registered can't be trained, and the error says what to do.", live=True)
    async def test_unregistered(self, agent: Agent) -> None:
        stranger = replace(agent.model, name="never-registered")
        with pytest.raises(ArtError, match="regist"):
            await agent.backend.train(stranger, await agent.groups())

    @check("BCK-013", MUST, "list_steps gives the steps that are kept, oldest first, the latest among them.", live=True)
    async def test_list_steps(self, agent: Agent) -> None:
        assert await agent.backend.list_steps(agent.model) == [0]
        await agent.train()
        steps = await agent.backend.list_steps(agent.model)
        assert steps == sorted(steps)
        assert steps[-1] == 1

    @check("BCK-014", MUST, "A name that can't be a folder or a part of an address is refused.", live=True)
    async def test_bad_names(self, agent: Agent) -> None:
        wrong: list[dict[str, Any]] = [{"name": "../evil"}, {"name": "a/b"}, {"name": "a@3"}, {"project": "a b"}]
        for fields in wrong:
            with pytest.raises(InvalidName):
                await agent.backend.register(replace(agent.model, **fields))

    @check(
        "BCK-015", MUST, "A base model that isn't there is BaseModelNotFound, and says what was looked for.", live=True
    )
    async def test_no_base_model(self, new_agent: NewAgent, tmp_path: Path) -> None:
        with pytest.raises(BaseModelNotFound, match="nowhere"):
            await new_agent(base_model=str(tmp_path / "nowhere"))

    @check("BCK-016", MUST, "Two models of one name in two projects don't touch each other.", live=True)
    async def test_projects(self, agent: Agent, new_agent: NewAgent, oracle: Oracle) -> None:
        other = await new_agent(project="conformance-two", name=agent.model.name)
        await agent.train()
        assert await agent.backend.get_step(other.model) == 0
        found = await other.ask(n=2)
        assert {version_of(sample) for sample in found} == {0}
        self.assert_answers_as(oracle, found, None)
        assert (await other.post(other.named(1))).status_code == 404

    @check(
        "BCK-017", MUST, "Two trainings of one model at once end as two steps, or the second is ModelBusy.", live=True
    )
    async def test_two_trainings(self, agent: Agent) -> None:
        groups = await agent.groups()
        outcomes = await asyncio.gather(
            *(agent.backend.train(agent.model, groups) for _ in range(2)), return_exceptions=True
        )
        results = [outcome for outcome in outcomes if isinstance(outcome, TrainResult)]
        assert all(isinstance(outcome, TrainResult | ModelBusy) for outcome in outcomes), outcomes
        assert sorted(result.step for result in results) == list(range(1, len(results) + 1))
        assert await agent.backend.get_step(agent.model) == len(results) >= 1

    @check("BCK-018", MUST, "The same training on two models gives the same loss.", live=True)
    async def test_reproducible(self, agent: Agent, new_agent: NewAgent) -> None:
        other = await new_agent()
        groups = await agent.groups()
        results = [await agent.backend.train(a.model, groups, learning_rate=1e-3) for a in (agent, other)]
        assert results[0].metrics["loss/train"] == pytest.approx(results[1].metrics["loss/train"], abs=1e-3)

    @check(
        "BCK-019",
        MUST,
        "Every method of an undeclared capability raises UnsupportedCapability, saying what instead.",
        live=True,
    )
    async def test_undeclared(self, agent: Agent) -> None:
        backend, model = agent.backend, agent.model

        async def lease() -> None:
            async with backend.lease(model):
                pass

        calls: dict[BackendCapability, Any] = {
            Cap.LEASES: lease,
            Cap.DELETE_CHECKPOINTS: lambda: backend.delete_checkpoints(model, []),
            Cap.FORK: lambda: backend.fork_checkpoint(model, "another"),
            Cap.PULL: lambda: backend.pull_checkpoint(model),
            Cap.SFT: lambda: backend.train_sft(model, [Trajectory()]),
        }
        for capability, call in calls.items():
            if capability in backend.capabilities:
                continue  # held by the checks that need it
            with undeclared(backend.name, capability, f"a method of {capability}"):
                await call()

    @check(
        *("BCK-021", MUST, "Chosen steps are deleted and announced; the served and the leased ones are refused."),
        needs=Cap.DELETE_CHECKPOINTS,
        live=True,
    )
    async def test_delete(self, agent: Agent) -> None:
        for _ in range(3):
            await agent.train(learning_rate=SMALL_RATE)
        with pytest.raises(CheckpointInUse):
            await agent.backend.delete_checkpoints(agent.model, [3])
        if Cap.LEASES in agent.backend.capabilities:
            async with agent.backend.lease(agent.model, 2):
                with pytest.raises(CheckpointInUse):
                    await agent.backend.delete_checkpoints(agent.model, [2])
        before = await agent.backend.list_steps(agent.model)
        assert await agent.backend.delete_checkpoints(agent.model, [1]) == [1]
        assert await agent.backend.list_steps(agent.model) == [step for step in before if step != 1]
        assert agent.heard.last("art_checkpoint_deleted")["checkpoint"].step == 1
        assert (await agent.train(learning_rate=SMALL_RATE)).step == 4

    @check(*("BCK-022", MUST, "A fork starts from the other model's weights."), needs=Cap.FORK, live=True)
    async def test_fork(self, agent: Agent, new_agent: NewAgent, oracle: Oracle) -> None:
        await agent.train()
        await agent.train()
        for limit, step in ((None, 2), (1, 1)):
            other = await new_agent()
            got = await agent.backend.fork_checkpoint(other.model, agent.model.name, not_after_step=limit)
            assert got == await agent.backend.get_step(other.model)
            found = await other.ask(n=4, max_tokens=24)
            assert {version_of(sample) for sample in found} == {got}
            self.assert_answers_as(oracle, found, await agent.folder(step), [None, await agent.folder(3 - step)])
        result = await other.train(learning_rate=SMALL_RATE)
        assert result.step == got + 1

    @check(
        *("BCK-023", MUST, "A pulled checkpoint is a PEFT adapter folder with the served weights."),
        needs=Cap.PULL,
        live=True,
    )
    async def test_pull(self, agent: Agent, oracle: Oracle, tmp_path: Path) -> None:
        await agent.train()
        wanted: tuple[Any, ...] = (None, "latest", 1)
        for step in wanted:
            folder = await agent.backend.pull_checkpoint(agent.model, step=step, local_path=tmp_path / f"pulled-{step}")
            assert (folder / ADAPTER_CONFIG).is_file()
            assert (folder / ADAPTER_WEIGHTS).is_file()
            self.assert_answers_as(oracle, await agent.ask(n=2), folder, [None])
        first = await agent.backend.pull_checkpoint(agent.model, step=0, local_path=tmp_path / "zero")
        assert all((v == 0).all() for k, v in load_file(first / ADAPTER_WEIGHTS).items() if "lora_B" in k)

    @check(
        *(
            "BCK-024",
            MUST,
            "base_model may be a PEFT adapter folder: step 0 answers as that adapter, training goes on from it.",
        ),
        needs=Cap.WARM_START,
        live=True,
    )
    async def test_warm_start(
        self, new_agent: NewAgent, conformance_model: Path, tmp_path: Path, oracle: Oracle
    ) -> None:
        adapter = write_adapter(tmp_path / "warm", conformance_model, seed=31)
        agent = await new_agent(base_model=str(adapter))
        found = await agent.ask(n=4)
        assert {version_of(sample) for sample in found} == {0}
        self.assert_answers_as(oracle, found, adapter, [None])
        await agent.train(learning_rate=0.0)
        self.assert_answers_as(oracle, await agent.ask(n=4), adapter, [None])

    @check(
        *("BCK-025", MUST, "A trained step's adapter folder is on this machine, where the result says."),
        needs=Cap.CHECKPOINTS_ON_DISK,
        live=True,
    )
    async def test_checkpoint_on_disk(self, agent: Agent, oracle: Oracle) -> None:
        result: Any = await agent.train()
        folder = Path(result.checkpoint_path)
        assert (folder / ADAPTER_WEIGHTS).is_file()
        self.assert_answers_as(oracle, await agent.ask(n=2), folder, [None])

    @check(*("BCK-026", MUST, "Requests are answered while a step trains."), needs=Cap.CONCURRENT_INFERENCE, live=True)
    async def test_concurrent(self, agent: Agent) -> None:
        groups = [group for _ in range(12) for group in await agent.groups()]
        training = asyncio.create_task(agent.backend.train(agent.model, groups, packed_sequence_length=256))
        answered_meanwhile = 0
        async with asyncio.timeout(200):
            while not training.done():
                began = "art_before_train" in agent.heard.names()
                await agent.ask(max_tokens=2)
                answered_meanwhile += began and "art_checkpoint_saved" not in agent.heard.names()
        await training
        assert answered_meanwhile > 0, "no request was answered between the start of training and its checkpoint"

    @check(
        *(
            "BCK-032",
            MUST,
            "inference_name gives a step's name, by default the latest's, and that step answers it; it is"
            " name@step unless the registration says that the endpoint has another name for the model.",
        ),
        live=True,
    )
    async def test_name_of_a_step(self, agent: Agent) -> None:
        names = [agent.backend.inference_name(agent.model)]
        await agent.train()
        names.append(agent.backend.inference_name(agent.model))
        assert names[0] != names[1]
        for step, name in enumerate(names):
            assert name == agent.named(step)
            if agent.registration.inference_model_name is None:
                assert name == inference_name(agent.model.name, step)
            answer = await agent.post(name, max_tokens=4)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == name
            assert {choice["policy_version"] for choice in answer.json()["choices"]} == {step}

    @check(
        *("BCK-036", MUST, "The hooks of a step are called once each, in order, and those of a failure not at all."),
        live=True,
    )
    async def test_hooks_in_order(self, agent: Agent) -> None:
        result = await agent.train()
        assert tuple(agent.heard.names(*TRAINING)) == STEP
        assert agent.heard.last("art_before_train")["step"] == result.step
        assert agent.heard.last("art_checkpoint_saved")["checkpoint"].step == result.step
        assert agent.heard.last("art_checkpoint_published")["receipt"].step == result.step
        assert agent.heard.last("art_after_train")["result"] == result

    @check(
        *("BCK-037", MUST, "A trained step's result names its artifact, by its model and its step."),
        needs=Cap.CHECKPOINTS_AS_ARTIFACTS,
        live=True,
    )
    async def test_artifact(self, agent: Agent) -> None:
        names = [getattr(await agent.train(learning_rate=SMALL_RATE), "artifact_name", None) for _ in range(2)]
        assert all(isinstance(name, str) and agent.model.name in name for name in names), names
        assert names[0] != names[1], "two steps have one artifact"

    @check(
        "BCK-030",
        MUST,
        "close can be called twice; opened again, the backend goes on at the last step, weights and all.",
        live=True,
    )
    async def test_reopen(
        self, open_backend: OpenBackend, new_agent: NewAgent, oracle: Oracle, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        folder = tmp_path_factory.mktemp("reopened")
        first = open_backend(folder)
        agent = await new_agent(backend=first)
        await agent.train()
        saved = await agent.folder(1)
        await first.close()
        await first.close()
        async with open_backend(folder) as second:
            registration = await second.register(agent.model)
            again = Agent(second, agent.model, registration, agent.client, agent.heard)
            assert await second.get_step(agent.model) == 1
            found = await again.ask(n=4)
            assert {version_of(sample) for sample in found} == {1}
            self.assert_answers_as(oracle, found, saved, [None])
            assert (await again.train(learning_rate=SMALL_RATE)).step == 2

    @check("BCK-031", SHOULD, "A save_checkpoint=False step is published like any other.", live=True)
    async def test_unsaved_step(self, agent: Agent) -> None:
        result = await agent.train(save_checkpoint=False)
        assert {version_of(sample) for sample in await agent.ask()} == {result.step}
