"""The code of the public documents, as a user would write it, against a backend in memory."""

import warnings
from dataclasses import dataclass

import pytest

import art
from art import TrainableModel
from art.dev import InternalModelConfig
from art_core import BackendSpec, PluginRegistry, hookimpl


@dataclass
class Scenario:
    field_1: str
    field_2: float


@pytest.fixture
def scenarios():
    return [Scenario(field_1="hello", field_2=0), Scenario(field_1="world!", field_2=1)]


async def rollout(model: art.Model, scenario: Scenario) -> art.Trajectory:
    openai_client = model.openai_client()
    trajectory = art.Trajectory(
        messages_and_choices=[{"role": "system", "content": "..."}, {"role": "user", "content": scenario.field_1}]
    )
    chat_completion = await openai_client.chat.completions.create(messages=trajectory.messages(), model=model.name)
    choice = chat_completion.choices[0]
    trajectory.messages_and_choices.append(choice)
    agent_performance_score: float = len(choice.message.content or "") + scenario.field_2
    trajectory.reward = agent_performance_score
    return trajectory


@pytest.fixture
async def registered(backend):
    model = art.TrainableModel(name="agent-001", project="my-agentic-task", base_model="Qwen/Qwen2.5-14B-Instruct")
    await model.register(backend)
    return model


async def test_the_training_loop(registered, backend, scenarios):
    model = registered
    for _ in range(await model.get_step(), 3):
        train_groups = await art.gather_trajectory_groups(
            (art.TrajectoryGroup(rollout(model, scenario) for _ in range(8)) for scenario in scenarios),
            pbar_desc="gather",
        )
        assert len(train_groups) == 2
        assert len(train_groups[0]) == 8
        result = await backend.train(model, train_groups, learning_rate=1e-5)
        await model.log(train_groups, metrics=result.metrics, step=result.step, split="train")
    assert await model.get_step() == 3
    assert model.get_inference_name() == "agent-001@3"
    for group in train_groups:
        for trajectory in group:
            (choice,) = trajectory.choices()
            assert choice.token_ids == [5, 6]
            assert len(choice.logprobs.content) == 2
            assert trajectory.initial_policy_version == trajectory.final_policy_version == 3
    read = pytest.importorskip("art_tracker_files")
    records = read.read_history(backend.path / "my-agentic-task" / "models" / "agent-001" / "history.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[0]["train/reward"] == 6.5
    assert records[0]["loss/train"] == 0.5


async def test_the_deprecated_training_loop(registered, scenarios):
    model = registered
    for _ in range(await model.get_step(), 2):
        train_groups = await art.gather_trajectory_groups(
            (art.TrajectoryGroup(rollout(model, scenario) for _ in range(8)) for scenario in scenarios),
            pbar_desc="gather",
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            await model.train(train_groups, config=art.TrainConfig(learning_rate=1e-5))
        assert [w.category for w in caught] == [DeprecationWarning]
    assert await model.get_step() == 2


def test_the_models_of_the_documents():
    art.TrainableModel(name="agent-001", project="my-agentic-task", base_model="/path/to/my_sft_lora_adapter")
    model = TrainableModel(
        name="pipeline-localbackend",
        project="my-project",
        base_model="Qwen/Qwen3-0.6B",
        _internal_config=InternalModelConfig(trainer_gpu_ids=[0], inference_gpu_ids=[1]),
    )
    assert model.internal_config == {"trainer_gpu_ids": [0], "inference_gpu_ids": [1]}


@pytest.mark.parametrize("backend_type", ["serverless", "local"])
async def test_the_choice_of_a_backend(monkeypatch, backend_type):
    """What is written there works once the backend's distribution is there."""

    class Plugin:
        art_api = 1

        @hookimpl
        def art_register_backends(self):
            factory = f"{__name__}:AwaitableBackend"
            return [
                BackendSpec(name="serverless", factory=factory, summary="Remote."),
                BackendSpec(name="local", factory=factory, summary="Here."),
            ]

    registry = PluginRegistry()
    registry.register(Plugin(), "stand-in")
    monkeypatch.setattr("art.backends.installed_plugins", lambda: registry)
    monkeypatch.setattr("art.backends.load_factory", lambda spec: AwaitableBackend)
    if backend_type == "serverless":
        from art.serverless.backend import ServerlessBackend

        backend = await ServerlessBackend()
    else:
        from art.local import LocalBackend

        backend = LocalBackend(in_process=False, path="./.art")
    assert isinstance(backend, AwaitableBackend)


class AwaitableBackend:
    def __init__(self, **options):
        self.options = options

    def __await__(self):
        return self
        yield
