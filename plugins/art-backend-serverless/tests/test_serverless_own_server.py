"""A client and a server of one's own: `art serve` as a real process, on torch, with a tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import art
from art.pipeline_trainer import PipelineTrainer, make_group_rollout_fn
from art.sft import create_lr_schedule
from art_backend_serverless import ServerlessBackend, ServiceRefused
from art_core import BackendCapability, ServerlessTrainResult
from art_core.errors import BaseModelNotFound, CheckpointInUse, CheckpointNotFound, UnknownArgument

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
HELLO: list[Any] = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, own_tiny_model: Path, art_serve: Callable[..., Any]
) -> Iterator[tuple[str, str]]:
    """One server for the tests of this module; each has models of its own."""
    with art_serve(tmp_path_factory.mktemp("serve"), f"tiny={own_tiny_model}") as address_and_key:
        yield address_and_key


@pytest.fixture
async def backend(server: tuple[str, str]) -> AsyncIterator[ServerlessBackend]:
    """A client of its own."""
    url, key = server
    async with ServerlessBackend(key, url, show_progress=False) as backend:
        yield backend


def a_model(name: str, folder: Path, **fields: Any) -> art.TrainableModel:
    return art.TrainableModel(name=name, project="own", base_model="tiny", base_path=str(folder), **fields)


async def attempt(model: art.Model, scenario: Any = None, config: Any = None) -> art.Trajectory:
    trajectory = art.Trajectory(messages_and_choices=list(HELLO))
    answer = await model.openai_client().chat.completions.create(
        messages=trajectory.messages(), model=model.name, max_tokens=12
    )
    choice = answer.choices[0]
    trajectory.messages_and_choices.append(choice)
    text = choice.message.content or ""
    trajectory.reward = text.count("a") + len(text) / 100
    return trajectory


async def some_groups(model: art.Model) -> list[art.TrajectoryGroup]:
    return await art.gather_trajectory_groups(
        (art.TrajectoryGroup(attempt(model) for _ in range(4)) for _ in range(2)), pbar_desc=None
    )


async def test_the_training_loop_of_the_documents(
    server: tuple[str, str], backend: ServerlessBackend, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url, key = server
    backend = await ServerlessBackend(key, url)
    model = a_model("loop", tmp_path)
    await model.register(backend)
    assert await model.get_step() == 0
    assert model.get_inference_name() == "wandb-artifact:///acme/own/loop:step0"
    for step in range(await model.get_step(), 2):
        groups = await some_groups(model)
        result = await backend.train(model, groups, learning_rate=1e-3)
        assert isinstance(result, ServerlessTrainResult)
        assert result.step == step + 1
        assert result.artifact_name == f"wandb-artifact:///acme/own/loop:step{step + 1}"
        assert result.metrics["data/step_num_gradient_steps"] >= 1
        await model.log(groups, metrics=result.metrics, step=result.step, split="train")
    versions = {trajectory.initial_policy_version for trajectory in groups[0]}
    assert versions == {1}
    shown = capfd.readouterr().err
    for phase in ("uploading", "queued, place 1", "training", "saving", "publishing"):
        assert f"train loop: {phase}" in shown, shown
    # Any OpenAI client, of the latest and of a certain step.
    client = openai.AsyncOpenAI(base_url=url, api_key=key)
    async with client:
        for name, version in ((model.get_inference_name(), 2), (model.get_inference_name(1), 1)):
            answer = await client.chat.completions.create(messages=HELLO, model=name, max_tokens=4)
            assert answer.model == name
            assert answer.choices[0].model_extra is not None
            assert answer.choices[0].model_extra["policy_version"] == version
            assert answer.choices[0].model_extra["token_ids"]


async def test_another_client_goes_on_where_the_service_is(
    server: tuple[str, str], backend: ServerlessBackend, tmp_path: Path
) -> None:
    model = a_model("resumed", tmp_path)
    await model.register(backend)
    await backend.train(model, await some_groups(model))
    url, key = server
    async with ServerlessBackend(key, url, show_progress=False) as second:
        again = a_model("resumed", tmp_path)
        await again.register(second)
        assert await again.get_step() == 1
        assert again.get_inference_name().endswith(":step1")
        assert (await second.train(again, await some_groups(again))).step == 2


async def test_options_beyond_the_published_are_taken_where_the_server_names_them(
    backend: ServerlessBackend, tmp_path: Path
) -> None:
    model = a_model("options", tmp_path)
    await model.register(backend)
    result = await backend.train(model, await some_groups(model), packed_sequence_length=128, loss_fn="ppo")
    assert result.step == 1
    with pytest.raises(UnknownArgument):
        await backend.train(model, [], plot_tensors=True)


async def test_supervised_training_uploads_the_conversations(backend: ServerlessBackend, tmp_path: Path) -> None:
    model = a_model("supervised", tmp_path)
    await model.register(backend)
    chats = [
        art.Trajectory(messages_and_choices=[*HELLO, {"role": "assistant", "content": f"good day {n}"}])
        for n in range(4)
    ]
    config = art.TrainSFTConfig(learning_rate=create_lr_schedule(2, 1e-3), batch_size=2)
    result = await model.train_sft(chats, config)
    assert result.step == 1
    assert result.metrics["data/step_num_gradient_steps"] == 2
    # Reinforcement learning goes on from it.
    assert (await backend.train(model, await some_groups(model))).step == 2


async def test_checkpoints_are_deleted_leased_pulled_and_forked(backend: ServerlessBackend, tmp_path: Path) -> None:
    model = a_model("kept", tmp_path)
    await model.register(backend)
    for _ in range(3):
        await backend.train(model, await some_groups(model), learning_rate=1e-4)
    assert await backend.list_steps(model) == [0, 1, 2, 3]
    async with backend.lease(model, 2) as name:
        assert name == "wandb-artifact:///acme/own/kept:step2"
        for steps in ([2], [3]):
            with pytest.raises(CheckpointInUse):
                await backend.delete_checkpoints(model, steps)
    assert await backend.delete_checkpoints(model, [1, 17]) == [1]
    assert await backend.list_steps(model) == [0, 2, 3]
    folder = await backend.pull_checkpoint(model, step="latest", local_path=tmp_path / "pulled")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in folder.iterdir()}
    own = await backend.pull_checkpoint(model, step=2)
    assert own == tmp_path / "own" / "models" / "kept" / "checkpoints" / "0002"
    assert await backend.pull_checkpoint(model, step=2) == own
    with pytest.raises(CheckpointNotFound, match="0, 2, 3"):
        await backend.pull_checkpoint(model, step=1)
    with pytest.raises(FileExistsError):
        await backend.pull_checkpoint(model, step=2, local_path=folder)
    other = a_model("forked", tmp_path)
    await other.register(backend)
    assert await backend.fork_checkpoint(other, "kept", not_after_step=2) == 2
    assert await other.get_step() == 2
    assert (await backend.train(other, await some_groups(other))).step == 3
    await backend.delete_model(other)
    with pytest.raises(ServiceRefused):
        await openai_answer(backend, model, "wandb-artifact:///acme/own/forked")


async def openai_answer(backend: ServerlessBackend, model: art.Model, name: str) -> Any:
    try:
        return await model.openai_client().chat.completions.create(messages=HELLO, model=name, max_tokens=2)
    except openai.NotFoundError as error:
        raise ServiceRefused(str(error), status=404) from error


async def test_a_pipeline_keeps_both_busy(backend: ServerlessBackend, tmp_path: Path) -> None:
    model = a_model("pipelined", tmp_path)
    await model.register(backend)
    assert BackendCapability.CONCURRENT_INFERENCE in backend.capabilities_for(model)
    trainer = PipelineTrainer(
        model,
        backend,
        make_group_rollout_fn(attempt, n=4),
        [{"n": n} for n in range(6)],
        None,
        num_rollout_workers=3,
        min_batch_size=2,
        max_batch_size=2,
        eval_every_n_steps=0,
        learning_rate=1e-3,
    )
    await trainer.train(handle_signals=False)
    assert await model.get_step() >= 2


async def test_what_the_server_refuses_is_said_in_its_words(
    server: tuple[str, str], backend: ServerlessBackend, tmp_path: Path
) -> None:
    with pytest.raises(BaseModelNotFound, match="nowhere"):
        await art.TrainableModel(name="x", project="own", base_model="nowhere").register(backend)
    with pytest.raises(ServiceRefused, match="401"):
        async with ServerlessBackend("wrong", server[0], show_progress=False) as stranger:
            await a_model("x", tmp_path).register(stranger)


async def test_two_clients_of_one_model_get_a_step_each(
    server: tuple[str, str], backend: ServerlessBackend, tmp_path: Path
) -> None:
    model = a_model("shared", tmp_path)
    await model.register(backend)
    groups = await some_groups(model)
    async with ServerlessBackend(server[1], server[0], show_progress=False) as second:
        again = a_model("shared", tmp_path)
        await again.register(second)
        results = await asyncio.gather(backend.train(model, groups), second.train(again, groups))
    assert sorted(result.step for result in results) == [1, 2]
