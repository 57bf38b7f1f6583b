"""What crosses between client, host and worker for a step: its trajectories, its KL reference, its events."""

import asyncio
import sys
import threading
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from art_backend_local.client.groups_file import groups_file
from art_backend_local.client.kl_reference import find_reference
from art_backend_local.servers import training_worker
from art_backend_local.servers.training_worker import TrainingWorker
from art_backend_local.wire.messages import OwnStep, TrainRequest
from art_backend_local.wire.told_work import followed, told
from art_core import PluginRegistry, TrainingLaunch, Trajectory, TrajectoryGroup, hookimpl, installed_plugins
from art_core.errors import ModelBusy, TrainingFailed
from art_core.registry import instantiate
from art_engine_kit.groups_file import read_groups
from art_engine_kit.train_options import TrainOptions
from art_engine_kit.training_wire import KlReference, TrainJob

MODEL = SimpleNamespace(project="p", name="m")


class Slow(Sequence):
    """Two groups, the second of which is given when it is let on."""

    def __init__(self):
        self.asked, self.go = threading.Event(), threading.Event()

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index >= 2:
            raise IndexError
        if index == 1:
            self.asked.set()
            self.go.wait(30)
        return TrajectoryGroup([Trajectory(reward=float(index))])


async def test_the_file_of_a_step_is_there_for_the_step_and_then_gone(tmp_path, groups):
    async with groups_file(tmp_path / "jobs", groups) as file:
        assert read_groups(file) == groups
    assert not list(file.parent.iterdir())


async def test_a_step_cancelled_while_its_file_is_written_leaves_nothing(tmp_path):
    slow = Slow()

    async def step():
        async with groups_file(tmp_path / "jobs", slow):
            pytest.fail("it was written after all")

    task = asyncio.create_task(step())
    assert await asyncio.to_thread(slow.asked.wait, 30)
    task.cancel()
    slow.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not list((tmp_path / "jobs").iterdir())


class Bucket:
    """A plugin that has step 3."""

    art_api = 1

    def __init__(self, folder):
        self.folder, self.asked = folder, []

    @hookimpl
    def art_resolve_checkpoint(self, step):
        self.asked.append(step)
        return self.folder if step == 3 else None


@pytest.mark.parametrize(
    ("options", "expected", "asked"),
    [
        ({}, None, []),
        ({"kl_penalty_coef": 0.1}, KlReference(), []),
        ({"kl_penalty_reference_step": 1}, OwnStep(step=1), []),
        ({"kl_penalty_coef": 0.1, "kl_penalty_reference_step": 3}, "bucket", [3]),
        ({"kl_penalty_reference_step": 4}, OwnStep(step=4), [4]),
        ({"kl_ref_adapter_path": "adapter"}, "adapter", []),
    ],
)
async def test_the_client_says_none_base_step_or_folder(tmp_path, monkeypatch, options, expected, asked):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    registry, bucket = PluginRegistry(), Bucket(tmp_path / "bucket")
    registry.register(bucket, name="bucket")
    given = TrainOptions.of(options, where="train")
    found = await find_reference(registry, MODEL, given, own_steps=[0, 1])
    assert found == (KlReference(adapter=tmp_path / expected) if isinstance(expected, str) else expected)
    assert bucket.asked == asked
    wire = TypeAdapter(TrainRequest.model_fields["reference"].annotation)
    assert wire.validate_json(wire.dump_json(found)) == found


async def test_a_folder_that_is_no_adapter_is_refused_by_the_client(tmp_path):
    given = TrainOptions(kl_ref_adapter_path=tmp_path)
    with pytest.raises(ValueError, match=r"kl_ref_adapter_path=.* is not a PEFT adapter folder"):
        await find_reference(PluginRegistry(), MODEL, given, own_steps=[])


async def lines_of(work):
    """What a client is sent of `work`."""
    answer = await asyncio.to_thread(lambda: TestClient(told(work)).get("/"))
    yield answer.content


async def test_work_is_followed_to_its_result_or_its_error():
    seen = []

    async def works(emit):
        emit({"event": "begun", "n": 1})
        return {"step": 3}

    async def fails(emit):
        raise ModelBusy("being trained")

    async def cut():
        yield b'{"event":"begun","n":2}\n{"event":"do'

    assert await followed(lines_of(works), seen.append) == {"step": 3}
    with pytest.raises(ModelBusy, match="being trained"):
        await followed(lines_of(fails), seen.append)
    assert await followed(cut(), seen.append) is None
    assert [event["n"] for event in seen] == [1, 2]


@pytest.mark.slow
async def test_a_worker_that_only_says_that_it_is_there_is_ended(tmp_path, fake_engines, monkeypatch):
    monkeypatch.setattr(training_worker, "SILENCE_LIMIT_S", 0.5)
    fake_engines(only_alive=True)
    engine = instantiate(installed_plugins().training_engine("fake"))
    launch = TrainingLaunch(base_model=tmp_path, host="127.0.0.1", port=0, token="", python=sys.executable)
    worker = TrainingWorker(engine, launch, log_file=tmp_path / "worker.log")
    await worker.ensure_running()
    job = TrainJob(model="p/m", step=1, start=tmp_path, destination=tmp_path / "1", groups_file=tmp_path / "none")
    try:
        with pytest.raises(TrainingFailed, match=r"said nothing for 0\.5 s and was ended"):
            async for _ in worker.run(job):
                pass
    finally:
        await worker.close()
