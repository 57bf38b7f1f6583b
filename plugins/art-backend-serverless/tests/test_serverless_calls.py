"""Each call of the published wire, with its exact path and fields, as a training script makes it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import pytest

import art
from art.pipeline_trainer import PipelineTrainer, make_group_rollout_fn
from art_backend_serverless import KeyMissing, ServerlessBackend, wire
from art_core import BackendCapability, hookimpl, installed_plugins
from art_core.errors import CheckpointInUse, CheckpointNotFound, ModelBusy, NotRegistered, UnsupportedCapability

ARTIFACT = "wandb-artifact:///key-owner/my-project/agent-001"


async def test_registering_makes_the_model_or_finds_it(cloud: Any, serverless: ServerlessBackend, model: Any) -> None:
    await model.register(serverless)
    first, second = cloud.calls("POST", "/v1/preview/models")
    assert first.json == second.json
    assert first.json == {
        "project": "my-project",
        "name": "agent-001",
        "base_model": "Qwen/Qwen2.5-0.5B-Instruct",
        "return_existing": True,
    }
    assert first.headers["content-type"] == "application/json"
    assert first.headers["idempotency-key"] != second.headers["idempotency-key"]
    assert len(cloud.models) == 1
    assert model.inference_base_url == cloud.base_url
    assert model.inference_api_key == cloud.key
    assert model.inference_model_name == ARTIFACT
    assert await model.get_step() == 0
    assert model.get_inference_name() == ARTIFACT
    assert model.get_inference_name(3) == f"{ARTIFACT}:step3"
    assert model.litellm_completion_params()["model"] == f"hosted_vllm/{ARTIFACT}"


async def test_an_entity_is_sent_and_the_service_s_answer_taken(cloud: Any, serverless: ServerlessBackend) -> None:
    model = art.TrainableModel(name="agent-001", project="my-project", entity="my-team", base_model="base")
    await model.register(serverless)
    assert cloud.calls("POST", "/v1/preview/models")[0].json["entity"] == "my-team"
    assert model.get_inference_name() == "wandb-artifact:///my-team/my-project/agent-001"


async def test_a_step_is_a_job_followed_by_its_events(
    cloud: Any, serverless: ServerlessBackend, model: Any, groups: Any
) -> None:
    result = await serverless.train(model, groups, learning_rate=1e-5, loss_fn="ppo", epsilon=0.3)
    (job,) = cloud.calls("POST", "/v1/preview/training-jobs")
    assert list(job.json) == ["model_id", "experimental_config", "trajectory_groups"]
    assert job.json["model_id"] == "model-0"
    assert job.json["experimental_config"] == {"learning_rate": 1e-5, "ppo": True, "epsilon": 0.3}
    assert job.headers["idempotency-key"]
    assert "content-encoding" not in job.headers
    sent = wire.groups_from_json(job.json["trajectory_groups"])
    assert [group.for_logging() for group in sent] == [group.for_logging() for group in groups]
    events = cloud.calls("GET", "/v1/preview/training-jobs/job-0/events")
    assert [each.query for each in events] == [{"limit": "1000"}]
    assert isinstance(result, art.ServerlessTrainResult)
    assert result.step == 1
    assert result.artifact_name == f"{ARTIFACT}:step1"
    assert result.metrics["loss/train"] == 0.375
    assert result.metrics["loss/grad_norm"] == 2.0
    assert result.metrics["data/step_num_gradient_steps"] == 2
    assert await model.get_step() == 1
    assert model.get_inference_name() == f"{ARTIFACT}:step1"


async def test_each_gradient_step_is_announced_as_the_service_tells_of_it(
    cloud: Any, serverless: ServerlessBackend, model: Any, groups: Any
) -> None:
    heard: list[Any] = []

    class Listener:
        art_api = 1

        @hookimpl
        def art_gradient_step(self, model: Any, step: int, done: int, total: int, metrics: dict[str, float]) -> None:
            heard.append((model.name, step, done, total, metrics))

        @hookimpl
        def art_checkpoint_saved(self) -> None:
            heard.append("saved")

    # A server of one's own counts, and may have tried the step before.
    counted = {"gradient_step": 1, "num_gradient_steps": 2, "loss/train": 0.5}
    again = {"gradient_step": 2, "num_gradient_steps": 2, "loss/train": 0.25}
    cloud.scripts.append(
        [
            *(("gradient_step", data) for data in (counted, counted, again)),
            ("training_ended", {"step": 1, "metrics": {"loss/train": 0.375}}),
        ]
    )
    installed_plugins().register(Listener(), "listener")
    try:
        result = await serverless.train(model, groups)
    finally:
        installed_plugins().unregister("listener")
    assert [each[:4] for each in heard[:-1]] == [(model.name, 1, done, 2) for done in (1, 1, 2)]
    assert heard[-1] == "saved"
    assert [each[4]["loss/train"] for each in heard[:-1]] == [0.5, 0.5, 0.25]
    assert result.metrics["loss/train"] == 0.375


async def test_events_are_read_page_by_page_until_the_last(
    cloud: Any, serverless: ServerlessBackend, model: Any, groups: Any
) -> None:
    cloud.page = 1
    result = await serverless.train(model, groups)
    asked = [each.query.get("after") for each in cloud.calls("GET", ".*/events")]
    assert asked == [None, "job-0-0", "job-0-1", "job-0-2"]
    assert result.metrics["data/step_num_gradient_steps"] == 2


@pytest.mark.parametrize("says", [True, False])
async def test_checkpoints_are_listed_over_many_pages(
    cloud: Any, serverless: ServerlessBackend, model: Any, says: bool
) -> None:
    cloud.says_has_more = says
    cloud.page = 3
    for step in range(1, 8):
        cloud.add_checkpoint("model-0", step)
    assert await serverless.list_steps(model) == [1, 2, 3, 4, 5, 6, 7]
    assert cloud.calls("GET", ".*/checkpoints")[-1].query["order"] == "asc"
    assert await model.get_step() == 7
    assert cloud.calls("GET", ".*/checkpoints")[-1].query == {"limit": "1", "order": "desc"}


async def test_chosen_checkpoints_are_deleted_and_announced(
    cloud: Any, serverless: ServerlessBackend, model: Any
) -> None:
    for step in range(1, 5):
        cloud.add_checkpoint("model-0", step)
    heard: list[int] = []

    class Listener:
        art_api = 1

    from art_core import hookimpl

    @hookimpl
    def art_checkpoint_deleted(checkpoint: Any) -> None:
        heard.append(checkpoint.step)

    listener: Any = Listener()
    listener.art_checkpoint_deleted = art_checkpoint_deleted
    installed_plugins().register(listener, "listener")
    try:
        async with serverless.lease(model, 2) as name:
            assert name == f"{ARTIFACT}:step2"
            for steps in ([1, 4], [2]):
                with pytest.raises(CheckpointInUse):
                    await serverless.delete_checkpoints(model, steps)
        assert await serverless.delete_checkpoints(model, [1, 2, 9]) == [1, 2]
    finally:
        installed_plugins().unregister("listener")
    (call,) = cloud.calls("DELETE", "/v1/preview/models/model-0/checkpoints")
    assert call.json == {"steps": [1, 2]}
    assert heard == [1, 2]
    assert await serverless.list_steps(model) == [3, 4]
    with pytest.raises(CheckpointNotFound, match="3, 4"):
        async with serverless.lease(model, 2):
            pass


async def test_a_model_is_deleted(cloud: Any, serverless: ServerlessBackend, model: Any) -> None:
    await serverless.delete_model(model)
    assert cloud.calls("DELETE", "/v1/preview/models/model-0")
    assert cloud.models == {}
    with pytest.raises(NotRegistered):
        await model.get_step()


@pytest.mark.parametrize("split", ["train", "val"])
async def test_what_a_model_logs_reaches_the_service(
    cloud: Any, serverless: ServerlessBackend, model: Any, groups: Any, split: str
) -> None:
    await model.log(groups, split=split, step=1)
    (call,) = cloud.calls("POST", "/v1/preview/models/model-0/log")
    assert set(call.json) == {"model_id", "trajectory_groups", "split"}
    assert call.json["split"] == split
    assert wire.groups_from_json(call.json["trajectory_groups"])[1].for_logging() == groups[1].for_logging()
    # It is kept here too, as with every backend.
    assert (model._folder() / "history.jsonl").exists()


async def test_what_a_pipeline_threw_away_is_not_sent(cloud: Any, model: Any, groups: Any) -> None:
    await model.log(groups, split="discarded", step=1)
    assert cloud.logged == []


async def test_another_backend_s_models_are_not_sent(cloud: Any, model: Any, groups: Any, tmp_path: Any) -> None:
    other = art.Model(name="other", project="my-project", base_path=str(tmp_path))
    await other.log(groups, step=1)
    assert cloud.logged == []


async def test_train_logs_nothing(cloud: Any, serverless: ServerlessBackend, model: Any, groups: Any) -> None:
    await serverless.train(model, groups)
    assert cloud.logged == []
    assert not (model._folder() / "history.jsonl").exists()


async def test_the_deprecated_way_trains_and_logs(cloud: Any, model: Any, groups: Any) -> None:
    with pytest.warns(DeprecationWarning, match="backend.train"):
        await model.train(groups, config=art.TrainConfig(learning_rate=1e-4))
    (job,) = cloud.calls("POST", "/v1/preview/training-jobs")
    assert job.json["experimental_config"] == {"learning_rate": 1e-4}
    assert [each["split"] for each in cloud.logged] == ["train"]


async def test_supervised_training_on_the_cloud_takes_an_artifact(
    cloud: Any, serverless: ServerlessBackend, model: Any, groups: Any
) -> None:
    url = "wandb-artifact:///key-owner/my-project/agent-001-sft-data:v0"
    result = await serverless.train_sft(model, [], training_data_url=url, batch_size=4, learning_rate=[1e-4, 5e-5])
    (job,) = cloud.calls("POST", "/v1/preview/sft-training-jobs")
    assert job.json == {
        "model_id": "model-0",
        "training_data_url": url,
        "config": {"batch_size": 4, "learning_rate": [1e-4, 5e-5]},
    }
    assert cloud.calls("GET", "/v1/preview/training-jobs/job-0/events")
    assert result.step == 1
    chats = [art.Trajectory(messages_and_choices=groups[0][0].messages_and_choices)]
    with pytest.raises(UnsupportedCapability, match="training_data_url"):
        await model.train_sft(chats)
    assert not cloud.calls("POST", ".*uploads")


async def test_what_the_service_has_no_call_for_is_refused_in_words(
    cloud: Any, serverless: ServerlessBackend, model: Any
) -> None:
    for call in (serverless.fork_checkpoint(model, "other"), serverless.pull_checkpoint(model)):
        with pytest.raises(UnsupportedCapability, match="art serve") as refusal:
            await call
        assert cloud.base_url in str(refusal.value)


def test_the_cloud_s_own_address_declares_what_it_can() -> None:
    assert ServerlessBackend("k").capabilities == {
        BackendCapability.CONCURRENT_INFERENCE,
        BackendCapability.LEASES,
        BackendCapability.DELETE_CHECKPOINTS,
        BackendCapability.CHECKPOINTS_AS_ARTIFACTS,
    }
    assert ServerlessBackend("k").base_url == "https://api.training.wandb.ai/v1"


async def test_it_is_awaited_entered_and_left() -> None:
    backend = ServerlessBackend(api_key="k")
    assert await backend is backend
    async with backend as entered:
        assert entered is backend
    with backend:
        pass
    await backend.close()
    assert art.ServerlessBackend is ServerlessBackend


async def test_two_trainings_of_one_model_at_once_are_refused(
    serverless: ServerlessBackend, model: Any, groups: Any
) -> None:
    outcomes = await asyncio.gather(*(serverless.train(model, groups) for _ in range(2)), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["ModelBusy", "ServerlessTrainResult"]
    assert isinstance(next(each for each in outcomes if isinstance(each, Exception)), ModelBusy)


async def test_the_openai_client_asks_the_service_under_its_own_name(cloud: Any, model: Any) -> None:
    said = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": []}

    async def complete(asked: Any) -> Any:
        return cloud.answer(said)

    cloud.fails("POST", "/v1/chat/completions", times=3, instead=complete)
    client = model.openai_client()
    for each in (client, client.with_options(timeout=5)):
        await each.chat.completions.create(messages=[], model=model.name)
    await client.chat.completions.create(messages=[], model=f"{ARTIFACT}:step2")
    names = [each.json["model"] for each in cloud.calls("POST", ".*completions")]
    assert names == [ARTIFACT, ARTIFACT, f"{ARTIFACT}:step2"]


async def test_a_pipeline_trains_on_the_service(cloud: Any, serverless: ServerlessBackend, model: Any) -> None:
    asked: list[str] = []

    async def rollout(model: Any, scenario: Any, config: Any) -> art.Trajectory:
        asked.append(model.get_inference_name())
        return art.Trajectory(messages_and_choices=[{"role": "user", "content": "hello"}], reward=len(asked))

    trainer = PipelineTrainer(
        model,
        serverless,
        make_group_rollout_fn(rollout, n=2),
        [{"n": n} for n in range(4)],
        None,
        num_rollout_workers=1,
        min_batch_size=2,
        max_batch_size=2,
        eval_every_n_steps=0,
        max_steps_off_policy=0,
    )
    await trainer.train(handle_signals=False)
    jobs = cloud.calls("POST", "/v1/preview/training-jobs")
    assert [len(job.json["trajectory_groups"]) for job in jobs] == [2, 2]
    assert jobs[0].json["experimental_config"] == {"learning_rate": 1e-5, "ppo": False, "scale_rewards": True}
    assert await model.get_step() == 2
    assert set(asked) == {ARTIFACT, f"{ARTIFACT}:step1"}


async def test_without_a_key_the_first_use_says_what_to_do(cloud: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    backend = ServerlessBackend(base_url=cloud.base_url, show_progress=False)
    model = art.TrainableModel(name="a", project="p", base_model="b")
    with pytest.raises(KeyMissing, match="WANDB_API_KEY"):
        await model.register(backend)
    assert cloud.asked == []
    monkeypatch.setenv("WANDB_API_KEY", f" {cloud.key}\n")
    await model.register(backend)


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "ключ"])
def test_what_can_t_be_a_key_is_refused_without_being_said(key: str) -> None:
    with pytest.raises(KeyMissing) as refusal:
        ServerlessBackend(api_key=key)
    assert not key or key not in str(refusal.value)


async def test_the_key_is_in_no_repr_and_no_error(
    cloud: Any, serverless: ServerlessBackend, model: Any, groups: Any
) -> None:
    async def telltale(asked: Any) -> Any:
        return cloud.answer({"detail": f"no {asked.headers['authorization']}"}, 400)

    cloud.fails("POST", ".*training-jobs", instead=telltale)
    with pytest.raises(Exception, match=r"no Bearer \[key\]") as refusal:
        await serverless.train(model, groups)
    registration = await serverless.register(model)
    for text in (repr(serverless), repr(registration), repr(vars(serverless)), str(refusal.value), repr(model)):
        assert cloud.key not in text


def test_importing_it_reads_no_environment_and_opens_nothing() -> None:
    code = (
        "import sys, art_backend_serverless, art_backend_serverless.plugin; "
        "assert not {'httpx', 'torch', 'tenacity', 'openai', 'uvicorn', 'starlette'} & set(sys.modules), sys.modules"
    )
    env = {**os.environ, "WANDB_API_KEY": "never read"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=60)


async def test_each_phase_is_a_line_where_no_terminal_is(
    cloud: Any, patience: Any, model: Any, groups: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    async with ServerlessBackend(cloud.key, cloud.base_url, patience=patience) as backend:
        await model.register(backend)
        await backend.train(model, groups, verbose=True)
    said = capsys.readouterr()
    lines = [line.partition(",")[0].partition(" |")[0] for line in said.err.splitlines()]
    assert lines == [
        "train agent-001: preparing the upload",
        "train agent-001: uploading",
        "train agent-001: training",
        "train agent-001: waiting for the checkpoint",
    ]
    assert "loss/train 0.375" in said.out


async def test_on_a_terminal_a_bar_is_fed_by_gradient_steps(
    cloud: Any, patience: Any, model: Any, groups: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from art_backend_serverless import progress

    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    progress._console.cache_clear()
    try:
        async with ServerlessBackend(cloud.key, cloud.base_url, patience=patience) as backend:
            await model.register(backend)
            cloud.scripts.append(
                [("training_started", {"num_sequences": 4}), ("gradient_step", {"metrics": {"loss/train": 0.5}})]
            )
            training = asyncio.create_task(backend.train(model, groups))
            while not cloud.calls("GET", ".*/events"):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)  # a redraw or two
            cloud.jobs["job-0"].append({"id": "end", "type": "training_ended", "data": {"step": 1}})
            await training
    finally:
        progress._console.cache_clear()
    shown = capsys.readouterr().err
    assert "train agent-001: training" in shown
    assert "1 of 4" in shown
    assert "loss 0.5" in shown
