"""A client and a server of one's own: `art serve` as a real process, on torch, with a tiny model."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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


@pytest.fixture
def server(own_server: tuple[str, str]) -> tuple[str, str]:
    """Its address and a key."""
    return own_server


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
    with pytest.raises(CheckpointNotFound, match="There is no model 'nobody'"):
        await backend.fork_checkpoint(other, "nobody")
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


def test_one_backend_serves_several_event_loops(server: tuple[str, str], tmp_path: Path) -> None:
    backend, model = ServerlessBackend(server[1], server[0], show_progress=False), a_model("loops", tmp_path)
    asyncio.run(model.register(backend))

    async def step() -> int:
        return (await backend.train(model, await some_groups(model))).step

    assert [asyncio.run(step()) for _ in range(2)] == [1, 2]


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


async def test_the_loop_of_the_page(
    backend: ServerlessBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "serverless.md").read_text(encoding="utf-8")
    source = page[page.index("```python\n") + 10 :]
    names: dict[str, Any] = {}
    exec(compile(source[: source.index("\n```")], "serverless.md", "exec"), names)
    model = await names["train_elsewhere"](backend, attempt, ["one", "two"], 2, base_model="tiny")
    assert await model.get_step() == 2


class Proxy:
    """Passes bytes on to the server until it is told to cut, as a network does. It knows nothing of HTTP but where a
    request ends.
    """

    def __init__(self, to: str) -> None:
        self._host, self._port = urlsplit(to).hostname, urlsplit(to).port
        self._writers: set[asyncio.StreamWriter] = set()
        self.up = True
        self.cuts = 0
        # Cuts when so many bytes have gone to the server, or as soon as it begins to answer a POST of a job.
        self.cut_after: int | None = None
        self.cut_answer = False
        self.pause_s = 0.0
        self.url = ""
        self.gzipped = False

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *error: object) -> None:
        self.cut()
        self._server.close()

    def cut(self) -> None:
        """End every connection at once."""
        for writer in self._writers:
            writer.transport.abort()

    async def cut_for(self, seconds: float) -> None:
        """And let none through meanwhile."""
        self.up = False
        self.cut()
        await asyncio.sleep(seconds)
        self.up = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.up:
            writer.transport.abort()
            return
        upstream_reader, upstream = await asyncio.open_connection(self._host, self._port)
        ours = {writer, upstream}
        self._writers |= ours
        asked = bytearray()
        try:
            await asyncio.gather(self._to(reader, upstream, asked), self._back(upstream_reader, writer, asked))
        except (ConnectionError, asyncio.IncompleteReadError):
            self.cuts += 1
        finally:
            self._writers -= ours
            for each in ours:
                each.transport.abort()

    async def _to(self, reader: asyncio.StreamReader, upstream: asyncio.StreamWriter, asked: bytearray) -> None:
        while data := await reader.read(4096):
            asked += data
            await asyncio.sleep(self.pause_s)
            of_a_job = b"POST /v1/preview/training-jobs" in asked
            self.gzipped |= of_a_job and b"content-encoding: gzip" in asked.lower()
            if of_a_job and self.cut_after is not None and len(asked) >= self.cut_after:
                self.cut_after = None
                raise ConnectionAbortedError
            upstream.write(data)
            await upstream.drain()
        raise ConnectionAbortedError

    async def _back(self, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: bytearray) -> None:
        while data := await upstream.read(4096):
            await asyncio.sleep(self.pause_s)
            if self.cut_answer and b"POST /v1/preview/training-jobs" in asked:
                self.cut_answer = False
                raise ConnectionAbortedError
            writer.write(data)
            await writer.drain()
        raise ConnectionAbortedError


@pytest.mark.parametrize("how", ["in the upload", "in the answer", "while it trains", "slow by far"])
async def test_a_network_that_fails_loses_no_step_and_trains_none_twice(
    server: tuple[str, str], tmp_path: Path, how: str
) -> None:
    url, key = server
    async with Proxy(url) as proxy, ServerlessBackend(key, proxy.url, show_progress=False) as backend:
        model = a_model(f"cut-{how.replace(' ', '-')}", tmp_path)
        await model.register(backend)
        groups = await some_groups(model)
        for step in range(1, 6):
            training = asyncio.create_task(backend.train(model, groups, learning_rate=1e-4))
            if how == "in the upload":
                proxy.cut_after = 200 + 300 * step
            elif how == "in the answer":
                proxy.cut_answer = True
            elif how == "slow by far":
                proxy.pause_s = 0.05
            else:
                await asyncio.sleep(0.05 * step)
                await proxy.cut_for(0.5)
            assert (await training).step == step
        assert await backend.list_steps(model) == [0, 1, 2, 3, 4, 5]
        assert proxy.gzipped
        assert proxy.cut_after is None
        assert not proxy.cut_answer
        assert proxy.cuts >= (5 if how != "slow by far" else 0)


@pytest.mark.exhaustive
async def test_a_network_cut_for_half_a_minute_costs_that_and_no_step(server: tuple[str, str], tmp_path: Path) -> None:
    url, key = server
    async with Proxy(url) as proxy, ServerlessBackend(key, proxy.url, show_progress=False) as backend:
        model = a_model("cut-for-long", tmp_path)
        await model.register(backend)
        groups = await some_groups(model)
        for step in range(1, 11):
            training = asyncio.create_task(backend.train(model, groups, learning_rate=1e-4))
            await asyncio.sleep(0.1 * step)
            await proxy.cut_for(30)
            assert (await training).step == step
        assert await backend.list_steps(model) == list(range(11))
        assert proxy.cuts >= 10


KILLED = """
import asyncio, sys
import art
from art_backend_serverless import ServerlessBackend

async def main(url, folder):
    backend = ServerlessBackend(base_url=url)
    model = art.TrainableModel(name="killed", project="own", base_model="tiny", base_path=folder)
    await model.register(backend)
    group = lambda: art.TrajectoryGroup([
        art.Trajectory(messages_and_choices=[{"role": "user", "content": "hi"}], reward=float(n)) for n in range(2)])
    print("begun", flush=True)
    await backend.train(model, [group()])

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_client_that_is_killed_loses_nothing_that_was_taken(
    server: tuple[str, str], backend: ServerlessBackend, tmp_path: Path
) -> None:
    model = a_model("killed", tmp_path)
    await model.register(backend)
    for n in range(4):
        before = await model.get_step()
        client = subprocess.Popen(
            [sys.executable, "-c", KILLED, server[0], str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "WANDB_API_KEY": server[1]},
        )
        assert client.stdout is not None
        await asyncio.to_thread(client.stdout.readline)
        await asyncio.sleep(0.1 * n)
        client.kill()
        client.wait()
        client.stdout.close()
        # Its job was taken and is trained to its end, or it was not: the next one comes after it either way.
        step = (await backend.train(model, await some_groups(model))).step
        assert step in (before + 1, before + 2)
        assert await backend.list_steps(model) == list(range(step + 1))
